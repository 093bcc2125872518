// SPDX-License-Identifier: GPL-2.0
/* Signal actions, masks, alternate stack and the pending queues. */
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/signal.h>
#include <linux/thread_info.h>

#include "pmig.h"

#define UNMASKABLE	(sigmask(SIGKILL) | sigmask(SIGSTOP))

void pmig_sigactions_capture(struct pmig_target *tg, struct pmig_pcb *pcb)
{
	int i;

	BUILD_BUG_ON(PMIG_NSIG != _NSIG);
	for (i = 0; i < _NSIG; i++) {
		const struct sigaction *sa = &tg->sighand->action[i].sa;
		struct pmig_sigaction *out = &pcb->sigactions[i];

		out->handler = (unsigned long)sa->sa_handler;
		out->flags = sa->sa_flags & UAPI_SA_FLAGS;
		out->restorer = (unsigned long)sa->sa_restorer;
		out->mask = sa->sa_mask.sig[0];
	}
}

int pmig_sigactions_check(const struct pmig_pcb *pcb)
{
	int i;

	for (i = 0; i < _NSIG; i++) {
		const struct pmig_sigaction *in = &pcb->sigactions[i];

		if (!pmig_user_addr(in->handler) ||
		    !pmig_user_addr(in->restorer) ||
		    in->flags & ~(u64)UAPI_SA_FLAGS || in->mask & UNMASKABLE)
			return -EINVAL;
		if ((i + 1 == SIGKILL || i + 1 == SIGSTOP) &&
		    (in->handler || in->flags || in->restorer || in->mask))
			return -EINVAL;
	}
	return 0;
}

int pmig_sigactions_restore(struct pmig_target *tg, const struct pmig_pcb *pcb)
{
	struct sighand_struct *sighand = tg->sighand;
	int i;

	if (refcount_read(&sighand->count) > tg->task->signal->nr_threads)
		return -EUSERS;
	for (i = 0; i < _NSIG; i++) {
		const struct pmig_sigaction *in = &pcb->sigactions[i];
		struct sigaction *sa = &sighand->action[i].sa;

		if (i + 1 == SIGKILL || i + 1 == SIGSTOP)
			continue;
		sa->sa_handler = (__sighandler_t)in->handler;
		sa->sa_flags = in->flags;
		sa->sa_restorer = (__sigrestore_t)in->restorer;
		sa->sa_mask.sig[0] = in->mask;
	}
	return 0;
}

void pmig_sigmask_capture(struct task_struct *task, struct pmig_sigmask *out)
{
	out->blocked = task->blocked.sig[0];
	out->has_saved = test_tsk_restore_sigmask(task);
	if (out->has_saved)
		out->saved = task->saved_sigmask.sig[0];
}

int pmig_sigmask_check(const struct pmig_sigmask *in)
{
	if (in->reserved || in->has_saved > 1 ||
	    (in->blocked | in->saved) & UNMASKABLE)
		return -EINVAL;
	return 0;
}

void pmig_sigmask_restore(struct task_struct *task,
			  const struct pmig_sigmask *in)
{
	task->blocked.sig[0] = in->blocked;
	if (in->has_saved)
		task->saved_sigmask.sig[0] = in->saved;
	/* As ptrace does: a bit of a stopped task's own. */
	task->restore_sigmask = in->has_saved;
	/* The task works out for itself whether anything is due. */
	set_tsk_thread_flag(task, TIF_SIGPENDING);
}

void pmig_altstack_capture(struct task_struct *task, struct pmig_altstack *out)
{
	out->sp = task->sas_ss_sp;
	out->bytes = task->sas_ss_size;
	out->flags = task->sas_ss_flags;
}

int pmig_altstack_check(const struct pmig_altstack *in)
{
	u32 mode = in->flags & ~SS_AUTODISARM;

	if (in->reserved)
		return -EINVAL;
	/* A task that never had one: no flags, no size. */
	if (!in->sp && !in->bytes)
		return mode == SS_DISABLE || !mode ? 0 : -EINVAL;
	if (mode && mode != SS_ONSTACK)
		return -EINVAL;
	if (in->bytes < MINSIGSTKSZ || !pmig_user_range(in->sp, in->bytes))
		return -EINVAL;
	return 0;
}

void pmig_altstack_restore(struct task_struct *task,
			   const struct pmig_altstack *in)
{
	task->sas_ss_sp = in->sp;
	task->sas_ss_size = in->bytes;
	task->sas_ss_flags = in->flags;
}

/* Fills at most room entries and returns how many there are. */
static u32 capture_queue(const struct sigpending *pending, u32 flags,
			 struct pmig_siginfo *out, u32 room, u32 n)
{
	const struct sigqueue *q;
	sigset_t bare = pending->signal;
	int sig;

	list_for_each_entry(q, &pending->list, list) {
		sigdelset(&bare, q->info.si_signo);
		if (n < room) {
			struct pmig_siginfo *e = &out[n];
			kernel_siginfo_t info = q->info;

			e->signo = info.si_signo;
			e->flags = flags;
			if (q->flags & SIGQUEUE_PREALLOC) {
				e->flags |= PMIG_SI_TIMER;
				if (info.si_code == SI_TIMER)
					info.si_sys_private = 0;
			}
			memcpy(e->info, &info, sizeof(info));
		}
		n++;
	}
	for (sig = 1; sig <= _NSIG; sig++) {
		if (!sigismember(&bare, sig))
			continue;
		if (n < room) {
			out[n].signo = sig;
			out[n].flags = flags | PMIG_SI_BARE;
		}
		n++;
	}
	return n;
}

/* out must be zeroed: siginfo_t is larger than what the kernel keeps. */
u32 pmig_pending_capture(struct task_struct *task, u64 sections,
			 struct pmig_siginfo *out, u32 room)
{
	u32 n = 0;

	BUILD_BUG_ON(sizeof(kernel_siginfo_t) > sizeof(out->info));
	if (sections & PMIG_SEC_PENDING)
		n = capture_queue(&task->pending, 0, out, room, n);
	if (sections & PMIG_SEC_SHARED_PENDING)
		n = capture_queue(&task->signal->shared_pending, PMIG_SI_SHARED,
				  out, room, n);
	return n;
}

int pmig_pending_check(const struct pmig_siginfo *in, u32 count, u64 sections)
{
	const u32 known = PMIG_SI_SHARED | PMIG_SI_BARE | PMIG_SI_TIMER;
	sigset_t seen[2] = {};
	u32 i;

	for (i = 0; i < count; i++) {
		const struct pmig_siginfo *e = &in[i];
		bool shared = e->flags & PMIG_SI_SHARED;
		kernel_siginfo_t info;

		if (!e->signo || e->signo > _NSIG || e->signo == SIGKILL ||
		    e->flags & ~known)
			return -EINVAL;
		if (!(sections & (shared ? PMIG_SEC_SHARED_PENDING :
					   PMIG_SEC_PENDING)))
			return -EINVAL;
		/* A standard signal is never queued twice. */
		if (e->signo < SIGRTMIN && sigismember(&seen[shared], e->signo))
			return -EINVAL;
		sigaddset(&seen[shared], e->signo);
		if (e->flags & PMIG_SI_BARE) {
			if (memchr_inv(e->info, 0, sizeof(e->info)))
				return -EINVAL;
			continue;
		}
		memcpy(&info, e->info, sizeof(info));
		if (info.si_signo != e->signo ||
		    memchr_inv(e->info + sizeof(info), 0,
			       sizeof(e->info) - sizeof(info)))
			return -EINVAL;
	}
	return 0;
}

/*
 * Only the kernel's own send_sig_info() makes queue entries, charged to the
 * task's user.  But sent as what they are, signals would be dropped, merged,
 * have their sender rewritten, end a group stop or kill the task.  So each
 * entry is made as the highest real-time signal, blocked meanwhile and marked
 * with a random value, taken off the queue at once, and given its true content.
 */
#define CARRIER		_NSIG

/* The first of two at once would unblock the carrier under the second. */
static DEFINE_MUTEX(carrier_mutex);

static bool carried(const struct sigqueue *q, u64 mark)
{
	return q->info.si_signo == CARRIER && q->info.si_code == SI_QUEUE &&
	       (unsigned long)q->info.si_ptr == mark;
}

static int make_entry(struct pmig_target *tg, const struct pmig_siginfo *e,
		      struct sigpending *fresh, bool carrier_was_bare)
{
	struct sigpending *pending = &tg->task->pending;
	struct sigqueue *q, *found = NULL;
	u64 mark = get_random_u64();
	bool others = carrier_was_bare;
	kernel_siginfo_t info;
	int err;

	clear_siginfo(&info);
	info.si_signo = CARRIER;
	info.si_code = SI_QUEUE;
	info.si_ptr = (void __user *)(unsigned long)mark;
	err = send_sig_info(CARRIER, &info, tg->task);
	if (err)
		return err;

	if (!pmig_lock_any(tg))
		return -ESRCH;
	list_for_each_entry_reverse(q, &pending->list, list) {
		if (!found && carried(q, mark))
			found = q;
		else if (q->info.si_signo == CARRIER)
			others = true;
	}
	if (found) {
		list_move_tail(&found->list, &fresh->list);
		if (!others)
			sigdelset(&pending->signal, CARRIER);
		memcpy(&found->info, e->info, sizeof(found->info));
		sigaddset(&fresh->signal, e->signo);
	}
	pmig_unlock_any(tg);
	return found ? 0 : -ESRCH;
}

static bool has_entry(const struct sigpending *pending, int sig)
{
	const struct sigqueue *q;

	list_for_each_entry(q, &pending->list, list)
		if (q->info.si_signo == sig)
			return true;
	return false;
}

static void replace_queue(struct sigpending *pending, struct sigpending *fresh)
{
	struct sigpending old;

	INIT_LIST_HEAD(&old.list);
	list_splice_init(&pending->list, &old.list);
	pending->signal = fresh->signal;
	list_splice_tail_init(&fresh->list, &pending->list);
	/* Under siglock: a timer's entry may be freed by its owner after it. */
	pmig_flush_sigqueue(&old);
}

static void nudge(struct task_struct *task, bool all)
{
	struct task_struct *t;

	set_tsk_thread_flag(task, TIF_SIGPENDING);
	if (!all)
		return;
	rcu_read_lock();
	for_each_thread(task, t)
		set_tsk_thread_flag(t, TIF_SIGPENDING);
	rcu_read_unlock();
}

static int replace_queues(struct pmig_target *tg, const struct pmig_siginfo *in,
			  u32 count, u64 sections)
{
	struct task_struct *task = tg->task;
	struct sigpending fresh[2];
	bool was_blocked, was_bare;
	int err;
	u32 i;

	for (i = 0; i < 2; i++) {
		INIT_LIST_HEAD(&fresh[i].list);
		sigemptyset(&fresh[i].signal);
	}
	err = pmig_lock_stopped(tg);
	if (err)
		return err;
	was_blocked = sigismember(&task->blocked, CARRIER);
	was_bare = sigismember(&task->pending.signal, CARRIER) &&
		   !has_entry(&task->pending, CARRIER);
	sigaddset(&task->blocked, CARRIER);
	err = pmig_unlock(tg);

	for (i = 0; i < count && !err; i++) {
		const struct pmig_siginfo *e = &in[i];
		struct sigpending *f = &fresh[!!(e->flags & PMIG_SI_SHARED)];

		/* Nobody ever reads SIGSTOP's siginfo. */
		if (e->flags & PMIG_SI_BARE || e->signo == SIGSTOP)
			sigaddset(&f->signal, e->signo);
		else
			err = make_entry(tg, e, f, was_bare);
		cond_resched();
	}

	/* The mask must come back even if the task was let go meanwhile. */
	if (pmig_lock_any(tg)) {
		if (!was_blocked)
			sigdelset(&task->blocked, CARRIER);
		nudge(task, false);
		pmig_unlock_any(tg);
	}
	if (!err)
		err = pmig_lock_stopped(tg);
	if (!err) {
		if (sections & PMIG_SEC_PENDING)
			replace_queue(&task->pending, &fresh[0]);
		if (sections & PMIG_SEC_SHARED_PENDING)
			replace_queue(&task->signal->shared_pending, &fresh[1]);
		nudge(task, sections & PMIG_SEC_SHARED_PENDING);
		return pmig_unlock(tg);
	}
	for (i = 0; i < 2; i++)
		pmig_flush_sigqueue(&fresh[i]);
	return err;
}

/*
 * Replaces the private queue, the shared one, or both.  Until the last step
 * nothing of the old queues is touched, so a failure leaves them whole.
 */
int pmig_pending_restore(struct pmig_target *tg, const struct pmig_siginfo *in,
			 u32 count, u64 sections)
{
	int err;

	if (mutex_lock_killable(&carrier_mutex))
		return -EINTR;
	err = replace_queues(tg, in, count, sections);
	mutex_unlock(&carrier_mutex);
	return err;
}
