/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The contract between pmig and its kernel module.
 *
 * Every structure passed by pointer begins with its own size.  A caller built
 * against an older header passes a smaller size and is served as far as that
 * reaches; a caller built against a newer one may pass a larger size as long
 * as the bytes the module does not know are zero (E2BIG otherwise).
 *
 * Addresses of the task's memory are plain numbers here.  No kernel address
 * ever crosses this interface.
 *
 * Errors of PMIG_IOC_CAPTURE and PMIG_IOC_RESTORE about the task's state:
 *
 *   EBADF        pidfd is not a pidfd, or exe_fd is not an open file
 *   ESRCH        the task is gone, exiting, or about to die of a signal
 *   EPERM        the caller lacks CAP_SYS_PTRACE, or both of
 *                CAP_CHECKPOINT_RESTORE and CAP_SYS_ADMIN, over the task
 *   EDEADLK      the task belongs to the calling process
 *   EOPNOTSUPP   a kernel thread or kernel-made worker; or a section that this
 *                kernel cannot restore
 *   ENOEXEC      a 32-bit task
 *   EBUSY        the task is not stopped
 *   EINPROGRESS  stopped in the middle of a system call (parent of a vfork,
 *                version 1 freezer, system suspend)
 *   EPROTO       a ptrace stop other than that of PTRACE_INTERRUPT
 *   EAGAIN       still on a CPU after 2 ms, or moved while the call ran, or
 *                (PENDING) RLIMIT_SIGPENDING of the task's user is used up
 *   EUSERS       signal actions shared with another process
 *
 * and about the arguments:
 *
 *   EFAULT, EINVAL, E2BIG, ENOMEM as usual
 *   ENOSPC       xstate_size or siginfo_count too small; the fields hold what
 *                is needed
 */
#ifndef PMIG_ABI_H
#define PMIG_ABI_H

#include <linux/types.h>

#define PMIG_DEVICE		"/dev/pmig"
#define PMIG_ABI_VERSION	1

/* ioctl numbers carry no size: the structures do. */
#define PMIG_IOC_QUERY		0xb701
#define PMIG_IOC_CAPTURE	0xb702
#define PMIG_IOC_RESTORE	0xb703
#define PMIG_IOC_VMAS		0xb704
#define PMIG_IOC_DIRTY		0xb705

/* Sections: per thread */
#define PMIG_SEC_REGS		(1ULL << 0)
#define PMIG_SEC_XSTATE		(1ULL << 1)
#define PMIG_SEC_SIGMASK	(1ULL << 2)
#define PMIG_SEC_ALTSTACK	(1ULL << 3)
#define PMIG_SEC_PENDING	(1ULL << 4)
#define PMIG_SEC_RESTART	(1ULL << 5)
#define PMIG_SEC_SCHED		(1ULL << 6)
#define PMIG_SEC_COMM		(1ULL << 7)
#define PMIG_SEC_TIDS		(1ULL << 8)
#define PMIG_SEC_RSEQ		(1ULL << 9)
#define PMIG_SEC_PRCTL		(1ULL << 10)
/* Sections: per process */
#define PMIG_SEC_SIGACTIONS	(1ULL << 16)
#define PMIG_SEC_SHARED_PENDING	(1ULL << 17)
#define PMIG_SEC_MM		(1ULL << 18)
#define PMIG_SEC_EXE		(1ULL << 19)	/* restore only: exe_fd */
#define PMIG_SEC_OOM		(1ULL << 20)
#define PMIG_SEC_ITIMERS	(1ULL << 21)
/* Capture only: what only the task itself may set, and what must be known */
#define PMIG_SEC_OWN		(1ULL << 32)
#define PMIG_SEC_INFO		(1ULL << 33)

/* Features */
#define PMIG_FEAT_VMAS		(1ULL << 0)
#define PMIG_FEAT_DIRTY		(1ULL << 1)

struct pmig_query {
	__u32 size;
	__u32 flags;			/* in: zero */
	__u32 abi_version;
	__u32 xstate_size;		/* bytes of XSTATE on this machine */
	__u64 features;			/* PMIG_FEAT_* */
	__u64 capture_sections;
	__u64 restore_sections;
	__u32 pcb_size;			/* sizeof(struct pmig_pcb) */
	__u32 max_siginfos;
};

/*
 * One call's arguments, for PMIG_IOC_CAPTURE and PMIG_IOC_RESTORE.
 *
 * The task is the one the pidfd stands for: a thread group's leader, or with
 * PIDFD_THREAD any thread.  done and failed are written back even when the
 * call fails.  A failed restore leaves the sections in done restored, the one
 * in failed undone or done in part, all others untouched.
 */
struct pmig_call {
	__u32 size;
	__u32 flags;			/* zero */
	__s32 pidfd;
	__s32 exe_fd;			/* for PMIG_SEC_EXE, otherwise -1 */
	__u64 sections;			/* PMIG_SEC_* asked for */
	__u64 done;			/* out: PMIG_SEC_* */
	__u64 failed;			/* out: the section that failed, or 0 */
	__u64 pcb;			/* pointer to struct pmig_pcb */
	__u64 xstate;			/* pointer to xstate_size bytes */
	__u64 siginfos;			/* pointer to struct pmig_siginfo[] */
	__u32 pcb_size;
	__u32 xstate_size;		/* capture: room in, bytes out */
	__u32 siginfo_count;		/* capture: room in, entries out */
	__u32 reserved;			/* zero */
};

/* Laid out like struct user_regs_struct. */
struct pmig_regs {
	__u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8;
	__u64 rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp, ss;
	__u64 fs_base, gs_base, ds, es, fs, gs;
};

#define PMIG_NSIG		64

struct pmig_sigaction {
	__u64 handler;
	__u64 flags;
	__u64 restorer;
	__u64 mask;
};

/*
 * has_saved: the task was interrupted in a call with a temporary mask (such as
 * ppoll or sigsuspend).  blocked is then that temporary mask, and saved the
 * one that comes back when the call ends.
 */
struct pmig_sigmask {
	__u64 blocked;
	__u64 saved;
	__u32 has_saved;
	__u32 reserved;
};

struct pmig_altstack {
	__u64 sp;
	__u64 bytes;
	__u32 flags;			/* SS_DISABLE, SS_AUTODISARM */
	__u32 reserved;
};

/* PMIG_SI_*: of a pending signal */
#define PMIG_SI_SHARED		(1U << 0)	/* the process's queue */
#define PMIG_SI_BARE		(1U << 1)	/* pending without a siginfo */
#define PMIG_SI_TIMER		(1U << 2)	/* capture: a POSIX timer's */

struct pmig_siginfo {
	__u32 signo;
	__u32 flags;
	__u8 info[128];			/* siginfo_t; only the first 48 carry */
};

/* PMIG_RESTART_*: what restart_syscall(2) would go on with */
#define PMIG_RESTART_NONE	0
#define PMIG_RESTART_NANOSLEEP	1
#define PMIG_RESTART_FUTEX	2
#define PMIG_RESTART_POLL	3
#define PMIG_RESTART_CPU_SLEEP	4		/* capture only */
#define PMIG_RESTART_OTHER	5		/* capture only */

#define PMIG_FUTEX_SHARED	(1U << 0)
#define PMIG_FUTEX_CLOCKRT	(1U << 1)
#define PMIG_FUTEX_TIMEOUT	(1U << 2)

#define PMIG_FOREVER		0x7fffffffffffffffULL

/*
 * deadline_ns is absolute, on the host's own clock `clockid` (time namespaces
 * not applied); now_ns is that clock's reading at capture.  On restore, with
 * now_ns not zero the call ends deadline_ns - now_ns after the restore; with
 * now_ns zero, deadline_ns is absolute on the restoring host's clock.
 * PMIG_FOREVER means no end and is not rebased.
 */
struct pmig_restart {
	__u32 kind;
	__s32 clockid;
	__u64 deadline_ns;
	__u64 now_ns;
	__u64 uaddr;			/* rmtp, futex word, or pollfd array */
	__u32 has_rmtp;			/* nanosleep: write the rest to uaddr */
	__u32 has_timeout;		/* poll */
	__u32 nfds;			/* poll */
	__u32 futex_val;
	__u32 futex_flags;		/* PMIG_FUTEX_* */
	__u32 futex_bitset;
};

#define PMIG_AUXV_MAX		64

/*
 * On restore dumpable, coredump_filter and thp_disable are set too; mlock_future
 * must be zero (only the task itself can account for it).
 */
struct pmig_mm {
	__u64 start_code, end_code;
	__u64 start_data, end_data;
	__u64 start_brk, brk;
	__u64 start_stack;
	__u64 arg_start, arg_end;
	__u64 env_start, env_end;
	__u64 vdso;			/* capture only */
	__u32 dumpable;			/* 0, 1, 2 as in prctl(2) */
	__u32 coredump_filter;
	__u32 thp_disable;
	__u32 mlock_future;		/* capture only: MCL_FUTURE 1, ONFAULT 2 */
	__u32 auxv_count;		/* words used, a multiple of two */
	__u32 reserved;
	__u64 auxv[PMIG_AUXV_MAX];
};

/* flags: SCHED_FLAG_RESET_ON_FORK, _RECLAIM, _DL_OVERRUN of sched_setattr(2) */
struct pmig_sched {
	__u32 policy;
	__s32 nice;
	__u32 rt_priority;
	__u32 flags;
	__u64 runtime_ns;		/* deadline; or a fair task's own slice */
	__u64 deadline_ns;
	__u64 period_ns;
	__u64 timer_slack_ns;
	__u64 default_timer_slack_ns;
};

struct pmig_comm {
	__u8 comm[16];			/* ends in a zero byte */
};

struct pmig_tids {
	__u64 robust_list;
	__u64 set_child_tid;
	__u64 clear_child_tid;
};

struct pmig_rseq {
	__u64 ptr;
	__u32 len;
	__u32 sig;
};

/* no_new_privs can be set, never cleared (EINVAL). */
struct pmig_prctl {
	__u32 pdeath_signal;
	__u32 personality;
	__u32 no_new_privs;
	__u32 reserved;
};

struct pmig_oom {
	__s32 score_adj;
	__s32 score_adj_min;
};

/* Zero value: not armed.  Of VIRTUAL and PROF only `real` can be restored. */
struct pmig_itimer {
	__u64 value_ns;			/* left until it fires */
	__u64 interval_ns;
};

struct pmig_itimers {
	struct pmig_itimer real;
	__u32 virt_armed;		/* capture only; zero on restore */
	__u32 prof_armed;		/* capture only; zero on restore */
};

struct pmig_own {
	__u32 securebits;
	__u32 child_subreaper;
};

/* PMIG_STOP_*: how the task is stopped */
#define PMIG_STOP_PTRACE	1
#define PMIG_STOP_GROUP		2
#define PMIG_STOP_FREEZER	3

/* PMIG_HAS_*: state outside the sections above that the task has */
#define PMIG_HAS_SECCOMP	(1ULL << 0)
#define PMIG_HAS_IO_PORTS	(1ULL << 1)	/* ioperm or iopl */
#define PMIG_HAS_LDT		(1ULL << 2)
#define PMIG_HAS_TLS_DESC	(1ULL << 3)
#define PMIG_HAS_BREAKPOINTS	(1ULL << 4)
#define PMIG_HAS_POSIX_TIMERS	(1ULL << 5)
#define PMIG_HAS_IO_URING	(1ULL << 6)
#define PMIG_HAS_SHADOW_STACK	(1ULL << 7)
#define PMIG_HAS_SEM_UNDO	(1ULL << 8)
#define PMIG_HAS_AIO		(1ULL << 9)
#define PMIG_HAS_PERF_EVENTS	(1ULL << 10)
#define PMIG_HAS_UPROBES	(1ULL << 11)
#define PMIG_HAS_NO_TSC		(1ULL << 12)
#define PMIG_HAS_NO_CPUID	(1ULL << 13)
#define PMIG_HAS_DISPATCH	(1ULL << 14)	/* syscall user dispatch */
#define PMIG_HAS_PI_FUTEX	(1ULL << 15)
#define PMIG_HAS_SHARED_MM	(1ULL << 16)	/* with another process */
#define PMIG_HAS_SHARED_SIGHAND	(1ULL << 17)	/* with another process */
#define PMIG_HAS_MDWE		(1ULL << 18)
#define PMIG_HAS_KSM		(1ULL << 19)	/* PR_SET_MEMORY_MERGE */
#define PMIG_HAS_SPECULATION	(1ULL << 20)	/* PR_SET_SPECULATION_CTRL */
#define PMIG_HAS_LAM		(1ULL << 21)	/* tagged addresses */
#define PMIG_HAS_IO_FLUSHER	(1ULL << 22)

struct pmig_info {
	__u32 pid;			/* in the caller's pid namespace */
	__u32 tgid;
	__u32 nr_threads;
	__u32 stop;			/* PMIG_STOP_* */
	__u64 has;			/* PMIG_HAS_* */
	__u64 start_monotonic_ns;	/* of the task, host clocks */
	__u64 start_boottime_ns;
	__u64 now_monotonic_ns;		/* host clocks at capture */
	__u64 now_boottime_ns;
	__u64 now_realtime_ns;
};

struct pmig_pcb {
	__u32 size;
	__u32 flags;			/* zero */
	struct pmig_info info;
	struct pmig_regs regs;
	struct pmig_sigmask sigmask;
	struct pmig_altstack altstack;
	struct pmig_restart restart;
	struct pmig_sched sched;
	struct pmig_comm comm;
	struct pmig_tids tids;
	struct pmig_rseq rseq;
	struct pmig_prctl prctl;
	struct pmig_oom oom;
	struct pmig_itimers itimers;
	struct pmig_own own;
	struct pmig_mm mm;
	struct pmig_sigaction sigactions[PMIG_NSIG];
};

/*
 * List mappings from address `start` upwards, as many as there is room for.
 * next is where to go on, or 0 at the end.  The task need not be stopped; the
 * list is then true only piecewise.
 */
struct pmig_vmas {
	__u32 size;
	__u32 flags;			/* zero */
	__s32 pidfd;
	__u32 entry_size;		/* sizeof(struct pmig_vma) */
	__u64 start;
	__u64 entries;			/* pointer to struct pmig_vma[] */
	__u32 count;			/* room in, entries out */
	__u32 reserved;			/* zero */
	__u64 next;			/* out */
};

/* PMIG_VM_*: the kernel's VM_* under numbers that stay */
#define PMIG_VM_READ		(1ULL << 0)
#define PMIG_VM_WRITE		(1ULL << 1)
#define PMIG_VM_EXEC		(1ULL << 2)
#define PMIG_VM_SHARED		(1ULL << 3)
#define PMIG_VM_MAYREAD		(1ULL << 4)
#define PMIG_VM_MAYWRITE	(1ULL << 5)
#define PMIG_VM_MAYEXEC		(1ULL << 6)
#define PMIG_VM_MAYSHARE	(1ULL << 7)
#define PMIG_VM_GROWSDOWN	(1ULL << 8)
#define PMIG_VM_PFNMAP		(1ULL << 9)
#define PMIG_VM_LOCKED		(1ULL << 10)
#define PMIG_VM_LOCKONFAULT	(1ULL << 11)
#define PMIG_VM_IO		(1ULL << 12)
#define PMIG_VM_SEQ_READ	(1ULL << 13)
#define PMIG_VM_RAND_READ	(1ULL << 14)
#define PMIG_VM_DONTCOPY	(1ULL << 15)
#define PMIG_VM_DONTEXPAND	(1ULL << 16)
#define PMIG_VM_ACCOUNT		(1ULL << 17)
#define PMIG_VM_NORESERVE	(1ULL << 18)
#define PMIG_VM_HUGETLB		(1ULL << 19)
#define PMIG_VM_SYNC		(1ULL << 20)
#define PMIG_VM_WIPEONFORK	(1ULL << 21)
#define PMIG_VM_DONTDUMP	(1ULL << 22)
#define PMIG_VM_SOFTDIRTY	(1ULL << 23)
#define PMIG_VM_MIXEDMAP	(1ULL << 24)
#define PMIG_VM_HUGEPAGE	(1ULL << 25)
#define PMIG_VM_NOHUGEPAGE	(1ULL << 26)
#define PMIG_VM_MERGEABLE	(1ULL << 27)
#define PMIG_VM_UFFD_MISSING	(1ULL << 28)
#define PMIG_VM_UFFD_WP		(1ULL << 29)
#define PMIG_VM_UFFD_MINOR	(1ULL << 30)
#define PMIG_VM_SHADOW_STACK	(1ULL << 31)
#define PMIG_VM_DROPPABLE	(1ULL << 32)
#define PMIG_VM_SEALED		(1ULL << 33)
#define PMIG_VM_OTHER		(1ULL << 62)	/* a flag not in this list */
#define PMIG_VM_FILE		(1ULL << 63)	/* dev, ino and offset hold */

struct pmig_vma {
	__u64 start;
	__u64 end;
	__u64 flags;			/* PMIG_VM_* */
	__u64 offset;			/* bytes into the file */
	__u64 ino;
	__u32 dev_major;
	__u32 dev_minor;
	__u32 pkey;
	__u32 page_bytes;		/* page size of the mapping */
	__u8 name[32];			/* "[vdso]" and the like, or empty */
};

/*
 * Look at the pages from `start` to `end` (PMIG_FEAT_DIRTY): one word for each
 * is written to `pages`, which has (end - start) / 4096 of them.  0: nothing is
 * there.  The task need not be stopped; the caller needs CAP_SYS_ADMIN too.
 *
 * With PMIG_DIRTY_CLEAN what is told as written counts as clean from then on:
 * read its bytes after the call.  Where the call fails (EFAULT, EINTR, ENOMEM)
 * what was written is lost, and all of it must be taken as written.
 *
 * The bytes of a page are what they were at the look before if its word is
 * the same and in neither look WRITTEN or HELD, with two exceptions: who gets
 * hold of a page (process_vm_writev(2), O_DIRECT, ...), writes to it and lets it
 * go again, all between two looks, is not seen; nor what was written to a page
 * that was then swapped out and in again: use it only where there is no swap.
 *
 * EOPNOTSUPP  something besides the processors writes to this memory (KVM)
 */
struct pmig_dirty {
	__u32 size;
	__u32 flags;			/* PMIG_DIRTY_* */
	__s32 pidfd;
	__u32 reserved;			/* zero */
	__u64 start;			/* multiples of 4096 */
	__u64 end;
	__u64 pages;			/* pointer to __u64[] */
};

#define PMIG_DIRTY_CLEAN	(1U << 0)

/* A page's word: which page it is, and */
#define PMIG_PAGE_PRESENT	(1ULL << 61)
/* somebody may write to it, or have written, unseen by the page tables */
#define PMIG_PAGE_HELD		(1ULL << 62)
#define PMIG_PAGE_WRITTEN	(1ULL << 63)

#endif /* PMIG_ABI_H */
