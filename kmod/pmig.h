/* SPDX-License-Identifier: GPL-2.0 */
#ifndef PMIG_H
#define PMIG_H

#include <linux/cred.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/types.h>

#include "pmig_abi.h"

#define PMIG_MAX_SIGINFOS	65536U
#define PMIG_MAX_XSTATE		(64U << 10)

/* Sections that are read and written under the task's siglock. */
#define PMIG_LOCKED_SECTIONS						\
	(PMIG_SEC_REGS | PMIG_SEC_XSTATE | PMIG_SEC_SIGMASK |		\
	 PMIG_SEC_ALTSTACK | PMIG_SEC_RESTART | PMIG_SEC_TIDS |		\
	 PMIG_SEC_RSEQ | PMIG_SEC_PRCTL | PMIG_SEC_SIGACTIONS |		\
	 PMIG_SEC_OOM | PMIG_SEC_ITIMERS)

/*
 * The task a call is about.  mm, user_ns and switches are those at the time
 * the caller's privilege was checked: pmig_lock_stopped() refuses the task if
 * any of them is another by then.
 */
struct pmig_target {
	struct task_struct *task;
	struct mm_struct *mm;
	const struct cred *cred;
	unsigned long switches;
	bool pinned;			/* switches is valid */
	u32 stop;			/* PMIG_STOP_* */
	struct sighand_struct *sighand;	/* while locked */
	unsigned long irqflags;
};

/* task.c */
int pmig_target_get(struct pmig_target *tg, int pidfd, bool need_stopped);
void pmig_target_put(struct pmig_target *tg);
int pmig_lock_stopped(struct pmig_target *tg);
int pmig_unlock(struct pmig_target *tg);
bool pmig_lock_any(struct pmig_target *tg);
void pmig_unlock_any(struct pmig_target *tg);

/* resolve.c */
struct restart_block;
struct pmig_symbols {
	long (*nanosleep)(struct restart_block *rb);
	long (*futex)(struct restart_block *rb);
	long (*poll)(struct restart_block *rb);
	long (*none)(struct restart_block *rb);
	long (*cpu_sleep)(struct restart_block *rb);
	bool flush;
	bool flush_tlb;
};

extern struct pmig_symbols pmig_syms;
void pmig_resolve(void);
void pmig_flush_sigqueue(struct sigpending *queue);
void pmig_flush_tlb(struct mm_struct *mm, unsigned long start,
		    unsigned long end);

/* regs.c */
u32 pmig_xstate_bytes(struct task_struct *task);
int pmig_regs_capture(struct task_struct *task, struct pmig_regs *out);
int pmig_regs_check(const struct pmig_regs *in);
int pmig_regs_restore(struct task_struct *task, const struct pmig_regs *in);
int pmig_xstate_capture(struct task_struct *task, void *buf, u32 bytes);
int pmig_xstate_restore(struct task_struct *task, const void *buf, u32 bytes);

/* signals.c */
void pmig_sigactions_capture(struct pmig_target *tg, struct pmig_pcb *pcb);
int pmig_sigactions_check(const struct pmig_pcb *pcb);
int pmig_sigactions_restore(struct pmig_target *tg, const struct pmig_pcb *pcb);
void pmig_sigmask_capture(struct task_struct *task, struct pmig_sigmask *out);
int pmig_sigmask_check(const struct pmig_sigmask *in);
void pmig_sigmask_restore(struct task_struct *task,
			  const struct pmig_sigmask *in);
void pmig_altstack_capture(struct task_struct *task, struct pmig_altstack *out);
int pmig_altstack_check(const struct pmig_altstack *in);
void pmig_altstack_restore(struct task_struct *task,
			   const struct pmig_altstack *in);
u32 pmig_pending_capture(struct task_struct *task, u64 sections,
			 struct pmig_siginfo *out, u32 room);
int pmig_pending_check(const struct pmig_siginfo *in, u32 count, u64 sections);
int pmig_pending_restore(struct pmig_target *tg, const struct pmig_siginfo *in,
			 u32 count, u64 sections);

/* restart.c */
void pmig_restart_capture(struct task_struct *task, struct pmig_restart *out);
int pmig_restart_check(const struct pmig_restart *in);
void pmig_restart_restore(struct task_struct *task,
			  const struct pmig_restart *in);
bool pmig_restart_available(void);

/* mm.c */
int pmig_mm_capture(struct mm_struct *mm, struct pmig_mm *out);
int pmig_mm_check(const struct pmig_mm *in);
int pmig_mm_restore(struct mm_struct *mm, const struct pmig_mm *in);
int pmig_exe_restore(struct mm_struct *mm, int exe_fd);
int pmig_vmas_list(struct pmig_vmas *call);

/* dirty.c */
int pmig_dirty_look(struct pmig_dirty *call);

/* misc.c */
void pmig_sched_capture(struct task_struct *task, struct pmig_sched *out);
int pmig_sched_check(const struct pmig_sched *in);
int pmig_sched_restore(struct task_struct *task, const struct pmig_sched *in);
void pmig_comm_capture(struct task_struct *task, struct pmig_comm *out);
int pmig_comm_check(const struct pmig_comm *in);
void pmig_comm_restore(struct task_struct *task, const struct pmig_comm *in);
void pmig_misc_capture(struct pmig_target *tg, u64 sections,
		       struct pmig_pcb *pcb);
int pmig_misc_check(u64 section, const struct pmig_pcb *pcb);
int pmig_misc_restore(struct task_struct *task, u64 section,
		      const struct pmig_pcb *pcb);
void pmig_info_capture(struct pmig_target *tg, struct pmig_info *out);
void pmig_own_capture(struct pmig_target *tg, struct pmig_own *out);

static inline bool pmig_user_addr(u64 addr)
{
	return addr < TASK_SIZE_MAX;
}

static inline bool pmig_user_range(u64 start, u64 bytes)
{
	return bytes <= TASK_SIZE_MAX && start <= TASK_SIZE_MAX - bytes;
}

#endif /* PMIG_H */
