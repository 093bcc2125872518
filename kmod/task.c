// SPDX-License-Identifier: GPL-2.0
/*
 * Which task a call is about, whether the caller may touch it, and whether it
 * is stopped where touching it is sound.
 */
#include <linux/delay.h>
#include <linux/elf.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/pid.h>
#include <linux/ptrace.h>
#include <linux/regset.h>
#include <linux/user_namespace.h>

#include "pmig.h"

/* A ptrace wait may return while the task is still on its way off the CPU. */
#define OFF_CPU_TRIES	40
#define OFF_CPU_US	50

static struct pid *pid_of_pidfd(int pidfd)
{
	struct file *file;
	struct inode *inode;
	struct pid *pid = ERR_PTR(-EBADF);

	file = fget(pidfd);
	if (!file)
		return pid;
	inode = file_inode(file);
	/*
	 * pidfd_pid() is not for modules.  Only the kernel makes a superblock
	 * with this magic; its inodes keep their struct pid in i_private and
	 * the root has none.
	 */
	if (inode->i_sb->s_magic == PID_FS_MAGIC && S_ISREG(inode->i_mode) &&
	    inode->i_private)
		pid = get_pid(inode->i_private);
	fput(file);
	return pid;
}

static int may_touch(const struct cred *cred, struct mm_struct *mm)
{
	struct user_namespace *ns = cred->user_ns;

	if (!ns_capable(ns, CAP_SYS_PTRACE))
		return -EPERM;
	if (!ns_capable(ns, CAP_CHECKPOINT_RESTORE) &&
	    !ns_capable(ns, CAP_SYS_ADMIN))
		return -EPERM;
	/* A program its user may not read can live in a namespace above. */
	if (mm && !ns_capable(mm->user_ns, CAP_SYS_PTRACE))
		return -EPERM;
	return 0;
}

int pmig_target_get(struct pmig_target *tg, int pidfd, bool need_stopped)
{
	struct task_struct *task;
	struct pid *pid;
	int err;

	memset(tg, 0, sizeof(*tg));
	pid = pid_of_pidfd(pidfd);
	if (IS_ERR(pid))
		return PTR_ERR(pid);
	task = get_pid_task(pid, PIDTYPE_PID);
	put_pid(pid);
	if (!task)
		return -ESRCH;

	tg->task = task;
	tg->cred = get_task_cred(task);
	err = -EDEADLK;
	if (need_stopped && same_thread_group(task, current))
		goto fail;
	err = -EOPNOTSUPP;
	if (task->flags & (PF_KTHREAD | PF_USER_WORKER | PF_IO_WORKER))
		goto fail;
	tg->mm = get_task_mm(task);
	err = may_touch(tg->cred, tg->mm);
	if (err)
		goto fail;
	err = -ESRCH;
	if (!tg->mm)
		goto fail;
	if (need_stopped) {
		err = pmig_lock_stopped(tg);
		if (err)
			goto fail;
		err = pmig_unlock(tg);
		if (err)
			goto fail;
	}
	return 0;

fail:
	pmig_target_put(tg);
	return err;
}

void pmig_target_put(struct pmig_target *tg)
{
	if (tg->mm)
		mmput(tg->mm);
	if (tg->cred)
		put_cred(tg->cred);
	if (tg->task)
		put_task_struct(tg->task);
	memset(tg, 0, sizeof(*tg));
}

/* lock_task_sighand(), which modules do not get: false if it is gone. */
bool pmig_lock_any(struct pmig_target *tg)
{
	struct sighand_struct *sighand;

	rcu_read_lock();
	for (;;) {
		sighand = rcu_dereference(tg->task->sighand);
		if (!sighand)
			break;
		spin_lock_irqsave(&sighand->siglock, tg->irqflags);
		/* exec may have given the task another one meanwhile. */
		if (likely(sighand == rcu_access_pointer(tg->task->sighand)))
			break;
		spin_unlock_irqrestore(&sighand->siglock, tg->irqflags);
	}
	rcu_read_unlock();
	tg->sighand = sighand;
	return sighand;
}

void pmig_unlock_any(struct pmig_target *tg)
{
	struct sighand_struct *sighand = tg->sighand;

	tg->sighand = NULL;
	spin_unlock_irqrestore(&sighand->siglock, tg->irqflags);
}

static bool interrupt_stop(struct task_struct *task)
{
	int code, sig;

	if (!task->last_siginfo)
		return false;
	code = task->last_siginfo->si_code;
	if (code >> 8 != PTRACE_EVENT_STOP)
		return false;
	/* SIGTRAP, or the stop signal when a group stop stands behind it. */
	sig = code & 0x7f;
	return sig == SIGTRAP || sig == SIGSTOP || sig == SIGTSTP ||
	       sig == SIGTTIN || sig == SIGTTOU;
}

/* Returns PMIG_STOP_*, or the reason why the task must not be touched. */
static int stop_kind(struct task_struct *task)
{
	unsigned int state = READ_ONCE(task->__state);
	unsigned long jobctl = READ_ONCE(task->jobctl);

	if (state & __TASK_TRACED) {
		if (!(jobctl & JOBCTL_TRACED) || !interrupt_stop(task))
			return -EPROTO;
		return PMIG_STOP_PTRACE;
	}
	if (state & __TASK_STOPPED)
		return jobctl & JOBCTL_STOPPED ? PMIG_STOP_GROUP : -EBUSY;
	if (state & TASK_FROZEN)
		return -EINPROGRESS;
	if (task->frozen) {
		if ((state & TASK_INTERRUPTIBLE) &&
		    (jobctl & JOBCTL_TRAP_FREEZE))
			return PMIG_STOP_FREEZER;
		/* The parent of a vfork counts as frozen inside the call. */
		if (state & TASK_UNINTERRUPTIBLE)
			return -EINPROGRESS;
	}
	return -EBUSY;
}

static int check_stopped(struct pmig_target *tg)
{
	struct task_struct *task = tg->task;
	struct signal_struct *signal = task->signal;
	int kind;

	if (task->exit_state || (task->flags & PF_EXITING) ||
	    (signal->flags & SIGNAL_GROUP_EXIT) || signal->group_exec_task ||
	    sigismember(&task->pending.signal, SIGKILL) ||
	    sigismember(&signal->shared_pending.signal, SIGKILL))
		return -ESRCH;
	/*
	 * While it is off the CPU in one of the good stops and siglock is
	 * held the task cannot exec, so this comparison holds until unlock.
	 */
	if (task->mm != tg->mm ||
	    rcu_access_pointer(task->real_cred) != tg->cred)
		return -EAGAIN;
	kind = stop_kind(task);
	if (kind < 0)
		return kind;
	/* Pairs with the release in finish_task(): its state is in memory. */
	if (smp_load_acquire(&task->on_cpu))
		return -EAGAIN;
	if (task_user_regset_view(task)->e_machine != EM_X86_64)
		return -ENOEXEC;
	tg->stop = kind;
	return 0;
}

static unsigned long switches_of(struct task_struct *task)
{
	return READ_ONCE(task->nvcsw) + READ_ONCE(task->nivcsw);
}

/*
 * Take the task's siglock with the task stopped and off its CPU.  Everything
 * that could let it go on (a ptrace request, SIGCONT, SIGKILL, the freezer's
 * thaw) needs that lock.  0, or an error with nothing locked.
 */
int pmig_lock_stopped(struct pmig_target *tg)
{
	int err, i;

	for (i = 0; ; i++) {
		if (!pmig_lock_any(tg))
			return -ESRCH;
		err = check_stopped(tg);
		if (!err)
			break;
		pmig_unlock_any(tg);
		if (err != -EAGAIN || i >= OFF_CPU_TRIES)
			return err;
		usleep_range(OFF_CPU_US, OFF_CPU_US + 10);
	}
	if (!tg->pinned) {
		tg->switches = switches_of(tg->task);
		tg->pinned = true;
	} else if (tg->switches != switches_of(tg->task)) {
		/* It ran between two steps of one call. */
		pmig_unlock_any(tg);
		return -EAGAIN;
	}
	return 0;
}

/*
 * A task in the freezer's stop can be woken without siglock by a late wakeup.
 * It gets no further than that lock, but what was written to its segment bases
 * would be lost when it is switched out again: so look once more.
 */
int pmig_unlock(struct pmig_target *tg)
{
	struct task_struct *task = tg->task;
	bool moved;

	/* What was written must be there before the question is asked. */
	smp_mb();
	moved = READ_ONCE(task->on_cpu) || switches_of(task) != tg->switches;
	pmig_unlock_any(tg);
	return moved ? -EAGAIN : 0;
}
