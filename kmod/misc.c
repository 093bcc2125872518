// SPDX-License-Identifier: GPL-2.0
/* Scheduling, names, and the small fields of a task and its process. */
#include <linux/hrtimer.h>
#include <linux/oom.h>
#include <linux/personality.h>
#include <linux/pid.h>
#include <linux/rseq.h>
#include <linux/sched/coredump.h>
#include <linux/sched/rt.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <uapi/linux/rseq.h>
#include <uapi/linux/sched/types.h>
#include <asm/prctl.h>

#include "pmig.h"

#define SCHED_FLAGS	(SCHED_FLAG_RESET_ON_FORK | SCHED_FLAG_RECLAIM | \
			 SCHED_FLAG_DL_OVERRUN)

void pmig_sched_capture(struct task_struct *task, struct pmig_sched *out)
{
	out->policy = task->policy;
	out->nice = task_nice(task);
	out->rt_priority = task->rt_priority;
	if (task->sched_reset_on_fork)
		out->flags |= SCHED_FLAG_RESET_ON_FORK;
	if (task->policy == SCHED_DEADLINE) {
		out->flags |= task->dl.flags & SCHED_FLAGS;
		out->runtime_ns = task->dl.dl_runtime;
		out->deadline_ns = task->dl.dl_deadline;
		out->period_ns = task->dl.dl_period;
	} else if (task->se.custom_slice) {
		out->runtime_ns = task->se.slice;
	}
	out->timer_slack_ns = task->timer_slack_ns;
	out->default_timer_slack_ns = task->default_timer_slack_ns;
}

int pmig_sched_check(const struct pmig_sched *in)
{
	bool rt = in->policy == SCHED_FIFO || in->policy == SCHED_RR;
	bool dl = in->policy == SCHED_DEADLINE;
	bool fair = in->policy == SCHED_NORMAL || in->policy == SCHED_BATCH ||
		    in->policy == SCHED_IDLE;

	if (!rt && !dl && !fair)
		return -EINVAL;
	if (in->nice < MIN_NICE || in->nice > MAX_NICE)
		return -EINVAL;
	if (rt ? !in->rt_priority || in->rt_priority >= MAX_RT_PRIO :
		 in->rt_priority)
		return -EINVAL;
	/* Another flag would make it one of the kernel's own. */
	if (in->flags & ~(dl ? SCHED_FLAGS : SCHED_FLAG_RESET_ON_FORK))
		return -EINVAL;
	if (!dl && (in->deadline_ns || in->period_ns))
		return -EINVAL;
	return 0;
}

int pmig_sched_restore(struct task_struct *task, const struct pmig_sched *in)
{
	struct sched_attr attr = {
		.size = sizeof(attr),
		.sched_policy = in->policy,
		.sched_flags = in->flags,
		.sched_nice = in->nice,
		.sched_priority = in->rt_priority,
		.sched_runtime = in->runtime_ns,
		.sched_deadline = in->deadline_ns,
		.sched_period = in->period_ns,
	};
	int err;

	err = sched_setattr_nocheck(task, &attr);
	if (err)
		return err;
	/* The policies that do not use it keep it all the same. */
	set_user_nice(task, in->nice);
	WRITE_ONCE(task->timer_slack_ns, in->timer_slack_ns);
	WRITE_ONCE(task->default_timer_slack_ns, in->default_timer_slack_ns);
	return 0;
}

void pmig_comm_capture(struct task_struct *task, struct pmig_comm *out)
{
	BUILD_BUG_ON(sizeof(out->comm) != TASK_COMM_LEN);
	task_lock(task);
	strscpy_pad(out->comm, task->comm, sizeof(out->comm));
	task_unlock(task);
}

int pmig_comm_check(const struct pmig_comm *in)
{
	return in->comm[sizeof(in->comm) - 1] ? -EINVAL : 0;
}

void pmig_comm_restore(struct task_struct *task, const struct pmig_comm *in)
{
	task_lock(task);
	strscpy_pad(task->comm, in->comm, sizeof(task->comm));
	task_unlock(task);
}

static void capture_itimers(struct signal_struct *signal,
			    struct pmig_itimers *out)
{
	struct hrtimer *timer = &signal->real_timer;

	if (hrtimer_active(timer)) {
		s64 left = ktime_to_ns(__hrtimer_get_remaining(timer, true));

		/* Zero would say that it is not armed. */
		out->real.value_ns = left > 0 ? left : 1;
	}
	out->real.interval_ns = ktime_to_ns(signal->it_real_incr);
	out->virt_armed = !!signal->it[CPUCLOCK_VIRT].expires;
	out->prof_armed = !!signal->it[CPUCLOCK_PROF].expires;
}

/* Under siglock, all sections that cannot fail. */
void pmig_misc_capture(struct pmig_target *tg, u64 sections,
		       struct pmig_pcb *pcb)
{
	struct task_struct *task = tg->task;
	struct signal_struct *signal = task->signal;

	if (sections & PMIG_SEC_TIDS) {
		pcb->tids.robust_list = (unsigned long)task->robust_list;
		pcb->tids.set_child_tid = (unsigned long)task->set_child_tid;
		pcb->tids.clear_child_tid =
			(unsigned long)task->clear_child_tid;
	}
	if (sections & PMIG_SEC_RSEQ) {
		pcb->rseq.ptr = (unsigned long)task->rseq;
		pcb->rseq.len = task->rseq_len;
		pcb->rseq.sig = task->rseq_sig;
	}
	if (sections & PMIG_SEC_PRCTL) {
		pcb->prctl.pdeath_signal = task->pdeath_signal;
		pcb->prctl.personality = task->personality;
		pcb->prctl.no_new_privs = task_no_new_privs(task);
	}
	if (sections & PMIG_SEC_OOM) {
		pcb->oom.score_adj = signal->oom_score_adj;
		pcb->oom.score_adj_min = signal->oom_score_adj_min;
	}
	if (sections & PMIG_SEC_ITIMERS)
		capture_itimers(signal, &pcb->itimers);
}

static int check_rseq(const struct pmig_rseq *in)
{
	const u32 original = 32;

	if (!in->ptr)
		return in->len || in->sig ? -EINVAL : 0;
	/* As rseq(2): the kernel writes there without asking again. */
	if (in->len < original || !pmig_user_range(in->ptr, in->len))
		return -EINVAL;
	if (in->len == original ?
	    !IS_ALIGNED(in->ptr, original) :
	    !IS_ALIGNED(in->ptr, __alignof__(struct rseq)) ||
	    in->len < offsetof(struct rseq, end))
		return -EINVAL;
	return 0;
}

int pmig_misc_check(u64 section, const struct pmig_pcb *pcb)
{
	switch (section) {
	case PMIG_SEC_TIDS:
		return pmig_user_addr(pcb->tids.robust_list) &&
		       pmig_user_addr(pcb->tids.set_child_tid) &&
		       pmig_user_addr(pcb->tids.clear_child_tid) ? 0 : -EINVAL;
	case PMIG_SEC_RSEQ:
		return check_rseq(&pcb->rseq);
	case PMIG_SEC_PRCTL:
		return pcb->prctl.pdeath_signal <= _NSIG &&
		       pcb->prctl.no_new_privs <= 1 &&
		       !pcb->prctl.reserved ? 0 : -EINVAL;
	case PMIG_SEC_OOM:
		return pcb->oom.score_adj >= OOM_SCORE_ADJ_MIN &&
		       pcb->oom.score_adj <= OOM_SCORE_ADJ_MAX &&
		       pcb->oom.score_adj_min >= OOM_SCORE_ADJ_MIN &&
		       pcb->oom.score_adj_min <= pcb->oom.score_adj ? 0 :
								     -EINVAL;
	case PMIG_SEC_ITIMERS:
		return pcb->itimers.real.value_ns <= KTIME_MAX &&
		       pcb->itimers.real.interval_ns <= KTIME_MAX &&
		       !pcb->itimers.virt_armed && !pcb->itimers.prof_armed ?
			       0 : -EINVAL;
	default:
		return -EINVAL;
	}
}

static int restore_itimers(struct signal_struct *signal,
			   const struct pmig_itimers *in)
{
	/* Its function needs siglock, so it cannot be waited for here. */
	if (hrtimer_try_to_cancel(&signal->real_timer) < 0)
		return -EAGAIN;
	signal->it_real_incr = ns_to_ktime(in->real.interval_ns);
	if (in->real.value_ns)
		hrtimer_start(&signal->real_timer,
			      ns_to_ktime(in->real.value_ns), HRTIMER_MODE_REL);
	return 0;
}

/* Under siglock. */
int pmig_misc_restore(struct task_struct *task, u64 section,
		      const struct pmig_pcb *pcb)
{
	switch (section) {
	case PMIG_SEC_TIDS:
		task->robust_list = (void __user *)pcb->tids.robust_list;
		task->set_child_tid = (void __user *)pcb->tids.set_child_tid;
		task->clear_child_tid =
			(void __user *)pcb->tids.clear_child_tid;
		return 0;
	case PMIG_SEC_RSEQ:
		task->rseq = (void __user *)pcb->rseq.ptr;
		task->rseq_len = pcb->rseq.len;
		task->rseq_sig = pcb->rseq.sig;
		/*
		 * It comes from another CPU: a critical section it was in must
		 * be aborted, and its CPU number written anew.
		 */
		set_bit(RSEQ_EVENT_MIGRATE_BIT, &task->rseq_event_mask);
		rseq_set_notify_resume(task);
		return 0;
	case PMIG_SEC_PRCTL:
		if (!pcb->prctl.no_new_privs && task_no_new_privs(task))
			return -EINVAL;
		if (pcb->prctl.no_new_privs)
			task_set_no_new_privs(task);
		task->pdeath_signal = pcb->prctl.pdeath_signal;
		task->personality = pcb->prctl.personality;
		return 0;
	case PMIG_SEC_OOM:
		WRITE_ONCE(task->signal->oom_score_adj, pcb->oom.score_adj);
		WRITE_ONCE(task->signal->oom_score_adj_min,
			   pcb->oom.score_adj_min);
		return 0;
	case PMIG_SEC_ITIMERS:
		return restore_itimers(task->signal, &pcb->itimers);
	default:
		return -EINVAL;
	}
}

void pmig_own_capture(struct pmig_target *tg, struct pmig_own *out)
{
	out->securebits = tg->cred->securebits;
	out->child_subreaper = tg->task->signal->is_child_subreaper;
}

static u64 thread_has(struct task_struct *task)
{
	struct thread_struct *thread = &task->thread;
	u64 has = 0;

	if (test_tsk_thread_flag(task, TIF_NOTSC))
		has |= PMIG_HAS_NO_TSC;
	if (test_tsk_thread_flag(task, TIF_NOCPUID))
		has |= PMIG_HAS_NO_CPUID;
	if (thread->io_bitmap || thread->iopl_emul)
		has |= PMIG_HAS_IO_PORTS;
	if (memchr_inv(thread->tls_array, 0, sizeof(thread->tls_array)))
		has |= PMIG_HAS_TLS_DESC;
	if (memchr_inv(thread->ptrace_bps, 0, sizeof(thread->ptrace_bps)))
		has |= PMIG_HAS_BREAKPOINTS;
#ifdef CONFIG_X86_USER_SHADOW_STACK
	if (thread->features)
		has |= PMIG_HAS_SHADOW_STACK;
#endif
	if (test_task_syscall_work(task, SYSCALL_USER_DISPATCH))
		has |= PMIG_HAS_DISPATCH;
	return has;
}

static u64 mm_has(struct mm_struct *mm, int threads)
{
	u64 has = 0;

	if (mm->context.ldt)
		has |= PMIG_HAS_LDT;
#ifdef CONFIG_ADDRESS_MASKING
	if (mm->context.lam_cr3_mask)
		has |= PMIG_HAS_LAM;
#endif
	if (rcu_access_pointer(mm->ioctx_table))
		has |= PMIG_HAS_AIO;
	if (test_bit(MMF_HAS_UPROBES, &mm->flags))
		has |= PMIG_HAS_UPROBES;
	if (test_bit(MMF_HAS_MDWE, &mm->flags))
		has |= PMIG_HAS_MDWE;
	if (test_bit(MMF_VM_MERGE_ANY, &mm->flags))
		has |= PMIG_HAS_KSM;
	/* One user more is this call. */
	if (test_bit(MMF_MULTIPROCESS, &mm->flags) &&
	    atomic_read(&mm->mm_users) > threads + 1)
		has |= PMIG_HAS_SHARED_MM;
	return has;
}

/* Under siglock. */
void pmig_info_capture(struct pmig_target *tg, struct pmig_info *out)
{
	struct task_struct *task = tg->task;
	struct signal_struct *signal = task->signal;
	u64 has = thread_has(task) | mm_has(tg->mm, signal->nr_threads);

	if (task->seccomp.mode)
		has |= PMIG_HAS_SECCOMP;
	if (!hlist_empty(&signal->posix_timers))
		has |= PMIG_HAS_POSIX_TIMERS;
	if (task->io_uring)
		has |= PMIG_HAS_IO_URING;
	if (task->sysvsem.undo_list)
		has |= PMIG_HAS_SEM_UNDO;
	if (task->perf_event_ctxp)
		has |= PMIG_HAS_PERF_EVENTS;
	if (task->utask)
		has |= PMIG_HAS_UPROBES;
	if (!list_empty(&task->pi_state_list))
		has |= PMIG_HAS_PI_FUTEX;
	if (refcount_read(&tg->sighand->count) > signal->nr_threads)
		has |= PMIG_HAS_SHARED_SIGHAND;
	if (task_spec_ssb_disable(task) || task_spec_ssb_noexec(task) ||
	    task_spec_ib_disable(task))
		has |= PMIG_HAS_SPECULATION;
	if ((task->flags & (PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE)) ==
	    (PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE))
		has |= PMIG_HAS_IO_FLUSHER;

	out->pid = task_pid_vnr(task);
	out->tgid = task_tgid_vnr(task);
	out->nr_threads = signal->nr_threads;
	out->stop = tg->stop;
	out->has = has;
	out->start_monotonic_ns = task->start_time;
	out->start_boottime_ns = task->start_boottime;
	out->now_monotonic_ns = ktime_get_ns();
	out->now_boottime_ns = ktime_get_boottime_ns();
	out->now_realtime_ns = ktime_get_real_ns();
}
