// SPDX-License-Identifier: GPL-2.0
/* The restart block: what restart_syscall(2) goes on with. */
#include <linux/ktime.h>
#include <linux/errno.h>
#include <linux/math64.h>
#include <linux/restart_block.h>
#include <linux/sched/task_stack.h>
#include <linux/time64.h>
#include <linux/timekeeping.h>
#include <linux/version.h>
#include <asm/ptrace.h>

#include "pmig.h"

/* kernel/futex/futex.h, not among the headers; so numbered from 6.7 on. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
#error "the futex flags of this kernel have not been checked"
#endif
#define FLAGS_SIZE_32		0x02
#define FLAGS_SHARED		0x10
#define FLAGS_CLOCKRT		0x20
#define FLAGS_HAS_TIMEOUT	0x40

static u64 clock_now(int clockid)
{
	switch (clockid) {
	case CLOCK_MONOTONIC:
		return ktime_get_ns();
	case CLOCK_BOOTTIME:
		return ktime_get_boottime_ns();
	case CLOCK_REALTIME:
		return ktime_get_real_ns();
	case CLOCK_TAI:
		return ktime_get_clocktai_ns();
	default:
		return 0;
	}
}

static bool clock_known(int clockid)
{
	return clockid == CLOCK_MONOTONIC || clockid == CLOCK_BOOTTIME ||
	       clockid == CLOCK_REALTIME || clockid == CLOCK_TAI;
}

bool pmig_restart_available(void)
{
	return pmig_syms.nanosleep && pmig_syms.futex && pmig_syms.poll &&
	       pmig_syms.none;
}

/* The block outlives its call: what cannot be carried matters only in use. */
static u32 odd_kind(struct task_struct *task, u32 kind)
{
	return (long)task_pt_regs(task)->ax == -ERESTART_RESTARTBLOCK ?
		       kind : PMIG_RESTART_NONE;
}

void pmig_restart_capture(struct task_struct *task, struct pmig_restart *out)
{
	const struct restart_block *rb = &task->restart_block;

	if (!rb->fn || rb->fn == pmig_syms.none) {
		out->kind = PMIG_RESTART_NONE;
		return;
	}
	if (rb->fn == pmig_syms.nanosleep) {
		out->kind = PMIG_RESTART_NANOSLEEP;
		out->clockid = rb->nanosleep.clockid;
		out->deadline_ns = min_t(u64, rb->nanosleep.expires, KTIME_MAX);
		if (rb->nanosleep.type == TT_NATIVE) {
			out->has_rmtp = 1;
			out->uaddr = (unsigned long)rb->nanosleep.rmtp;
		} else if (rb->nanosleep.type != TT_NONE) {
			memset(out, 0, sizeof(*out));
			out->kind = odd_kind(task, PMIG_RESTART_OTHER);
			return;
		}
	} else if (rb->fn == pmig_syms.futex) {
		u32 flags = rb->futex.flags;

		if (flags & ~(FLAGS_SIZE_32 | FLAGS_SHARED | FLAGS_CLOCKRT |
			      FLAGS_HAS_TIMEOUT) ||
		    !(flags & FLAGS_SIZE_32)) {
			out->kind = odd_kind(task, PMIG_RESTART_OTHER);
			return;
		}
		out->kind = PMIG_RESTART_FUTEX;
		out->uaddr = (unsigned long)rb->futex.uaddr;
		out->futex_val = rb->futex.val;
		out->futex_bitset = rb->futex.bitset;
		if (flags & FLAGS_SHARED)
			out->futex_flags |= PMIG_FUTEX_SHARED;
		if (flags & FLAGS_CLOCKRT)
			out->futex_flags |= PMIG_FUTEX_CLOCKRT;
		out->clockid = flags & FLAGS_CLOCKRT ? CLOCK_REALTIME :
						       CLOCK_MONOTONIC;
		out->deadline_ns = PMIG_FOREVER;
		if (flags & FLAGS_HAS_TIMEOUT) {
			out->futex_flags |= PMIG_FUTEX_TIMEOUT;
			out->deadline_ns = min_t(u64, rb->futex.time, KTIME_MAX);
		}
	} else if (rb->fn == pmig_syms.poll) {
		out->kind = PMIG_RESTART_POLL;
		out->clockid = CLOCK_MONOTONIC;
		out->uaddr = (unsigned long)rb->poll.ufds;
		out->nfds = rb->poll.nfds;
		out->deadline_ns = PMIG_FOREVER;
		if (rb->poll.has_timeout) {
			out->has_timeout = 1;
			if (rb->poll.tv_sec < KTIME_SEC_MAX)
				out->deadline_ns = rb->poll.tv_sec *
							NSEC_PER_SEC +
						   rb->poll.tv_nsec;
		}
	} else if (rb->fn == pmig_syms.cpu_sleep) {
		out->kind = odd_kind(task, PMIG_RESTART_CPU_SLEEP);
		if (out->kind == PMIG_RESTART_NONE)
			return;
		out->clockid = rb->nanosleep.clockid;
		out->deadline_ns = min_t(u64, rb->nanosleep.expires, KTIME_MAX);
		return;
	} else {
		out->kind = odd_kind(task, PMIG_RESTART_OTHER);
		return;
	}
	out->now_ns = clock_now(out->clockid);
}

int pmig_restart_check(const struct pmig_restart *in)
{
	if (in->has_rmtp > 1 || in->has_timeout > 1 ||
	    in->deadline_ns > PMIG_FOREVER || in->now_ns > PMIG_FOREVER)
		return -EINVAL;
	if (!pmig_user_addr(in->uaddr))
		return -EINVAL;
	switch (in->kind) {
	case PMIG_RESTART_NONE:
		return 0;
	case PMIG_RESTART_NANOSLEEP:
		/* The timer code warns about a clock that it does not know. */
		return clock_known(in->clockid) ? 0 : -EINVAL;
	case PMIG_RESTART_FUTEX:
		if (in->futex_flags & ~(PMIG_FUTEX_SHARED | PMIG_FUTEX_CLOCKRT |
					PMIG_FUTEX_TIMEOUT))
			return -EINVAL;
		if (in->clockid != (in->futex_flags & PMIG_FUTEX_CLOCKRT ?
				    CLOCK_REALTIME : CLOCK_MONOTONIC))
			return -EINVAL;
		return 0;
	case PMIG_RESTART_POLL:
		if (in->clockid != CLOCK_MONOTONIC || in->nfds > INT_MAX)
			return -EINVAL;
		return 0;
	case PMIG_RESTART_CPU_SLEEP:
	case PMIG_RESTART_OTHER:
		return -EOPNOTSUPP;
	default:
		return -EINVAL;
	}
}

static u64 rebase(const struct pmig_restart *in)
{
	s64 left;
	u64 now;

	if (in->deadline_ns == PMIG_FOREVER || !in->now_ns)
		return in->deadline_ns;
	/* Both are within KTIME_MAX, so neither step can overflow. */
	left = (s64)in->deadline_ns - (s64)in->now_ns;
	now = clock_now(in->clockid);
	if (left < 0)
		return now > -left ? now + left : 0;
	return min_t(u64, now + left, KTIME_MAX - 1);
}

void pmig_restart_restore(struct task_struct *task,
			  const struct pmig_restart *in)
{
	struct restart_block *rb = &task->restart_block;
	u64 deadline = rebase(in);
	u32 rem;

	memset(rb, 0, sizeof(*rb));
	switch (in->kind) {
	case PMIG_RESTART_NANOSLEEP:
		rb->nanosleep.clockid = in->clockid;
		rb->nanosleep.type = in->has_rmtp ? TT_NATIVE : TT_NONE;
		rb->nanosleep.rmtp = (void __user *)in->uaddr;
		rb->nanosleep.expires = deadline;
		rb->fn = pmig_syms.nanosleep;
		break;
	case PMIG_RESTART_FUTEX:
		rb->futex.uaddr = (void __user *)in->uaddr;
		rb->futex.val = in->futex_val;
		rb->futex.bitset = in->futex_bitset;
		rb->futex.flags = FLAGS_SIZE_32;
		if (in->futex_flags & PMIG_FUTEX_SHARED)
			rb->futex.flags |= FLAGS_SHARED;
		if (in->futex_flags & PMIG_FUTEX_CLOCKRT)
			rb->futex.flags |= FLAGS_CLOCKRT;
		if (in->futex_flags & PMIG_FUTEX_TIMEOUT) {
			rb->futex.flags |= FLAGS_HAS_TIMEOUT;
			rb->futex.time = deadline;
		}
		rb->fn = pmig_syms.futex;
		break;
	case PMIG_RESTART_POLL:
		rb->poll.ufds = (void __user *)in->uaddr;
		rb->poll.nfds = in->nfds;
		rb->poll.has_timeout = in->has_timeout;
		if (deadline == PMIG_FOREVER) {
			rb->poll.tv_sec = TIME64_MAX;
		} else {
			rb->poll.tv_sec = div_u64_rem(deadline, NSEC_PER_SEC,
						      &rem);
			rb->poll.tv_nsec = rem;
		}
		rb->fn = pmig_syms.poll;
		break;
	default:
		rb->fn = pmig_syms.none;
		break;
	}
}
