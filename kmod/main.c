// SPDX-License-Identifier: GPL-2.0
/*
 * pmig: capture and restore of the process control block of a stopped task.
 *
 * /dev/pmig, mode 0600.  What the calls mean stands in pmig_abi.h.
 */
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "pmig.h"

#define SECTIONS_BOTH							\
	(PMIG_LOCKED_SECTIONS | PMIG_SEC_PENDING |			\
	 PMIG_SEC_SHARED_PENDING | PMIG_SEC_SCHED | PMIG_SEC_COMM |	\
	 PMIG_SEC_MM)
#define CAPTURE_SECTIONS (SECTIONS_BOTH | PMIG_SEC_OWN | PMIG_SEC_INFO)
#define QUEUES		(PMIG_SEC_PENDING | PMIG_SEC_SHARED_PENDING)

struct job {
	struct pmig_call call;
	struct pmig_target tg;
	struct pmig_pcb *pcb;
	void *xstate;
	struct pmig_siginfo *siginfos;
};

static u64 restore_sections(void)
{
	u64 sections = SECTIONS_BOTH | PMIG_SEC_EXE;

	if (!pmig_syms.flush)
		sections &= ~QUEUES;
	if (!pmig_restart_available())
		sections &= ~PMIG_SEC_RESTART;
	return sections;
}

static const struct {
	u64 section;
	size_t end;
} extents[] = {
#define EXTENT(sec, field) { sec, offsetofend(struct pmig_pcb, field) }
	EXTENT(PMIG_SEC_INFO, info),
	EXTENT(PMIG_SEC_REGS, regs),
	EXTENT(PMIG_SEC_SIGMASK, sigmask),
	EXTENT(PMIG_SEC_ALTSTACK, altstack),
	EXTENT(PMIG_SEC_RESTART, restart),
	EXTENT(PMIG_SEC_SCHED, sched),
	EXTENT(PMIG_SEC_COMM, comm),
	EXTENT(PMIG_SEC_TIDS, tids),
	EXTENT(PMIG_SEC_RSEQ, rseq),
	EXTENT(PMIG_SEC_PRCTL, prctl),
	EXTENT(PMIG_SEC_OOM, oom),
	EXTENT(PMIG_SEC_ITIMERS, itimers),
	EXTENT(PMIG_SEC_OWN, own),
	EXTENT(PMIG_SEC_MM, mm),
	EXTENT(PMIG_SEC_SIGACTIONS, sigactions),
#undef EXTENT
};

/* Reads a structure that begins with its size, at most a page of it. */
static int read_sized(void *to, size_t known, size_t least,
		      const void __user *from)
{
	u32 size;
	int err;

	if (get_user(size, (const u32 __user *)from))
		return -EFAULT;
	if (size < least || size > PAGE_SIZE)
		return size < least ? -EINVAL : -E2BIG;
	err = copy_struct_from_user(to, known, from, size);
	if (err)
		return err;
	/* It may have changed between the two reads. */
	*(u32 *)to = size;
	return 0;
}

static int write_sized(void __user *to, const void *from, size_t known,
		       u32 size)
{
	size_t n = min_t(size_t, known, size);

	if (copy_to_user(to, from, n) || clear_user(to + n, size - n))
		return -EFAULT;
	return 0;
}

static long ioctl_query(void __user *arg)
{
	struct pmig_query q;
	u32 size;
	int err;

	err = read_sized(&q, sizeof(q), offsetofend(struct pmig_query, flags),
			 arg);
	if (err)
		return err;
	if (q.flags)
		return -EINVAL;
	size = q.size;
	memset(&q, 0, sizeof(q));
	q.size = size;
	q.abi_version = PMIG_ABI_VERSION;
	q.xstate_size = pmig_xstate_bytes(current);
	q.features = PMIG_FEAT_VMAS;
	if (pmig_syms.flush_tlb)
		q.features |= PMIG_FEAT_DIRTY;
	q.capture_sections = CAPTURE_SECTIONS;
	q.restore_sections = restore_sections();
	q.pcb_size = sizeof(struct pmig_pcb);
	q.max_siginfos = PMIG_MAX_SIGINFOS;
	return write_sized(arg, &q, sizeof(q), size);
}

static long ioctl_vmas(void __user *arg)
{
	struct pmig_vmas call;
	int err;

	err = read_sized(&call, sizeof(call), sizeof(call), arg);
	if (err)
		return err;
	err = pmig_vmas_list(&call);
	if (err)
		return err;
	return write_sized(arg, &call, sizeof(call), call.size);
}

static long ioctl_dirty(void __user *arg)
{
	struct pmig_dirty call;
	int err;

	err = read_sized(&call, sizeof(call), sizeof(call), arg);
	if (err)
		return err;
	return pmig_dirty_look(&call);
}

/* What both calls ask of their arguments. */
static int job_check(struct job *job, u64 allowed)
{
	const struct pmig_call *c = &job->call;
	int i;

	if (c->flags || c->reserved || c->done || c->failed || !c->sections ||
	    c->sections & ~(CAPTURE_SECTIONS | PMIG_SEC_EXE))
		return -EINVAL;
	if (c->sections & ~allowed)
		return -EOPNOTSUPP;
	if (!(c->sections & PMIG_SEC_EXE) && c->exe_fd != -1)
		return -EINVAL;
	if (c->pcb_size < offsetofend(struct pmig_pcb, flags))
		return -EINVAL;
	if (c->pcb_size > PAGE_SIZE * 4)
		return -E2BIG;
	for (i = 0; i < ARRAY_SIZE(extents); i++)
		if (c->sections & extents[i].section &&
		    c->pcb_size < extents[i].end)
			return -EINVAL;
	if (!(c->sections & PMIG_SEC_XSTATE) && (c->xstate || c->xstate_size))
		return -EINVAL;
	if (!(c->sections & QUEUES) && (c->siginfos || c->siginfo_count))
		return -EINVAL;
	if (c->xstate_size > PMIG_MAX_XSTATE ||
	    c->siginfo_count > PMIG_MAX_SIGINFOS)
		return -E2BIG;
	return 0;
}

static void job_free(struct job *job)
{
	kvfree(job->siginfos);
	kvfree(job->xstate);
	kfree(job->pcb);
}

static int job_alloc(struct job *job)
{
	const struct pmig_call *c = &job->call;

	job->pcb = kzalloc(sizeof(*job->pcb), GFP_KERNEL_ACCOUNT);
	if (!job->pcb)
		return -ENOMEM;
	if (c->xstate_size) {
		job->xstate = kvzalloc(c->xstate_size, GFP_KERNEL_ACCOUNT);
		if (!job->xstate)
			return -ENOMEM;
	}
	if (c->siginfo_count) {
		job->siginfos = kvcalloc(c->siginfo_count,
					 sizeof(*job->siginfos),
					 GFP_KERNEL_ACCOUNT);
		if (!job->siginfos)
			return -ENOMEM;
	}
	return 0;
}

/* Under siglock. */
static int capture_locked(struct job *job)
{
	struct task_struct *task = job->tg.task;
	struct pmig_call *c = &job->call;
	struct pmig_pcb *pcb = job->pcb;
	u64 s = c->sections;
	int err;

	if (s & PMIG_SEC_INFO)
		pmig_info_capture(&job->tg, &pcb->info);
	if (s & PMIG_SEC_OWN)
		pmig_own_capture(&job->tg, &pcb->own);
	if (s & PMIG_SEC_SIGACTIONS)
		pmig_sigactions_capture(&job->tg, pcb);
	if (s & PMIG_SEC_SIGMASK)
		pmig_sigmask_capture(task, &pcb->sigmask);
	if (s & PMIG_SEC_ALTSTACK)
		pmig_altstack_capture(task, &pcb->altstack);
	if (s & PMIG_SEC_RESTART)
		pmig_restart_capture(task, &pcb->restart);
	pmig_misc_capture(&job->tg, s, pcb);

	if (s & PMIG_SEC_REGS) {
		c->failed = PMIG_SEC_REGS;
		err = pmig_regs_capture(task, &pcb->regs);
		if (err)
			return err;
	}
	if (s & PMIG_SEC_XSTATE) {
		u32 need = pmig_xstate_bytes(task);
		u32 room = c->xstate_size;

		c->failed = PMIG_SEC_XSTATE;
		c->xstate_size = need;
		if (!need)
			return -EOPNOTSUPP;
		if (room < need)
			return -ENOSPC;
		err = pmig_xstate_capture(task, job->xstate, need);
		if (err)
			return err;
	}
	if (s & QUEUES) {
		u32 room = c->siginfo_count;

		c->failed = s & QUEUES & -(s & QUEUES);
		c->siginfo_count = pmig_pending_capture(task, s, job->siginfos,
							room);
		if (c->siginfo_count > room)
			return -ENOSPC;
	}
	c->failed = 0;
	return 0;
}

static int capture(struct job *job)
{
	struct pmig_call *c = &job->call;
	struct pmig_pcb *pcb = job->pcb;
	u64 s = c->sections;
	int err, moved;

	if (s & PMIG_SEC_SCHED)
		pmig_sched_capture(job->tg.task, &pcb->sched);
	if (s & PMIG_SEC_COMM)
		pmig_comm_capture(job->tg.task, &pcb->comm);
	if (s & PMIG_SEC_MM) {
		err = pmig_mm_capture(job->tg.mm, &pcb->mm);
		if (err)
			return err;
	}
	err = pmig_lock_stopped(&job->tg);
	if (err)
		return err;
	err = capture_locked(job);
	moved = pmig_unlock(&job->tg);
	if (err || moved)
		return err ?: moved;

	pcb->size = min_t(size_t, c->pcb_size, sizeof(*pcb));
	if (write_sized(u64_to_user_ptr(c->pcb), pcb, sizeof(*pcb),
			c->pcb_size))
		return -EFAULT;
	if (s & PMIG_SEC_XSTATE &&
	    copy_to_user(u64_to_user_ptr(c->xstate), job->xstate,
			 c->xstate_size))
		return -EFAULT;
	if (s & QUEUES && c->siginfo_count &&
	    copy_to_user(u64_to_user_ptr(c->siginfos), job->siginfos,
			 c->siginfo_count * sizeof(*job->siginfos)))
		return -EFAULT;
	c->done = s;
	return 0;
}

static int read_restore(struct job *job)
{
	const struct pmig_call *c = &job->call;
	struct pmig_pcb *pcb = job->pcb;
	int err;

	err = copy_struct_from_user(pcb, sizeof(*pcb), u64_to_user_ptr(c->pcb),
				    c->pcb_size);
	if (err)
		return err;
	if (pcb->flags || pcb->size != c->pcb_size)
		return -EINVAL;
	if (c->xstate_size &&
	    copy_from_user(job->xstate, u64_to_user_ptr(c->xstate),
			   c->xstate_size))
		return -EFAULT;
	if (c->siginfo_count &&
	    copy_from_user(job->siginfos, u64_to_user_ptr(c->siginfos),
			   c->siginfo_count * sizeof(*job->siginfos)))
		return -EFAULT;
	return 0;
}

static int check_section(struct job *job, u64 section)
{
	const struct pmig_call *c = &job->call;
	const struct pmig_pcb *pcb = job->pcb;

	switch (section) {
	case PMIG_SEC_REGS:
		return pmig_regs_check(&pcb->regs);
	case PMIG_SEC_XSTATE:
		return c->xstate_size == pmig_xstate_bytes(current) ? 0 :
								      -EINVAL;
	case PMIG_SEC_SIGMASK:
		return pmig_sigmask_check(&pcb->sigmask);
	case PMIG_SEC_ALTSTACK:
		return pmig_altstack_check(&pcb->altstack);
	case PMIG_SEC_PENDING:
	case PMIG_SEC_SHARED_PENDING:
		return pmig_pending_check(job->siginfos, c->siginfo_count,
					  c->sections);
	case PMIG_SEC_RESTART:
		return pmig_restart_check(&pcb->restart);
	case PMIG_SEC_SCHED:
		return pmig_sched_check(&pcb->sched);
	case PMIG_SEC_COMM:
		return pmig_comm_check(&pcb->comm);
	case PMIG_SEC_SIGACTIONS:
		return pmig_sigactions_check(pcb);
	case PMIG_SEC_MM:
		return pmig_mm_check(&pcb->mm);
	case PMIG_SEC_EXE:
		return 0;
	default:
		return pmig_misc_check(section, pcb);
	}
}

/* Outside siglock: these sleep. */
static int restore_unlocked(struct job *job, u64 section)
{
	struct pmig_target *tg = &job->tg;
	const struct pmig_pcb *pcb = job->pcb;

	switch (section) {
	case PMIG_SEC_SCHED:
		return pmig_sched_restore(tg->task, &pcb->sched);
	case PMIG_SEC_COMM:
		pmig_comm_restore(tg->task, &pcb->comm);
		return 0;
	case PMIG_SEC_MM:
		return pmig_mm_restore(tg->mm, &pcb->mm);
	case PMIG_SEC_EXE:
		return pmig_exe_restore(tg->mm, job->call.exe_fd);
	default:
		return -EINVAL;
	}
}

static int restore_locked(struct job *job, u64 section)
{
	struct task_struct *task = job->tg.task;
	const struct pmig_pcb *pcb = job->pcb;

	switch (section) {
	case PMIG_SEC_REGS:
		return pmig_regs_restore(task, &pcb->regs);
	case PMIG_SEC_XSTATE:
		return pmig_xstate_restore(task, job->xstate,
					   job->call.xstate_size);
	case PMIG_SEC_SIGMASK:
		pmig_sigmask_restore(task, &pcb->sigmask);
		return 0;
	case PMIG_SEC_ALTSTACK:
		pmig_altstack_restore(task, &pcb->altstack);
		return 0;
	case PMIG_SEC_RESTART:
		pmig_restart_restore(task, &pcb->restart);
		return 0;
	case PMIG_SEC_SIGACTIONS:
		return pmig_sigactions_restore(&job->tg, pcb);
	default:
		return pmig_misc_restore(task, section, pcb);
	}
}

static int restore_under_lock(struct job *job)
{
	struct pmig_call *c = &job->call;
	u64 todo = c->sections & PMIG_LOCKED_SECTIONS;
	u64 done = 0;
	int err, moved;

	if (!todo)
		return 0;
	err = pmig_lock_stopped(&job->tg);
	if (err)
		return err;
	while (todo && !err) {
		u64 section = todo & -todo;

		c->failed = section;
		err = restore_locked(job, section);
		if (!err)
			done |= section;
		todo &= ~section;
	}
	moved = pmig_unlock(&job->tg);
	/* Registers written to a task that was on a CPU may be lost. */
	if (moved)
		return moved;
	c->done |= done;
	return err;
}

static int restore(struct job *job)
{
	struct pmig_call *c = &job->call;
	u64 todo = c->sections & ~(PMIG_LOCKED_SECTIONS | QUEUES);
	int err;

	while (todo) {
		u64 section = todo & -todo;

		c->failed = section;
		err = restore_unlocked(job, section);
		if (err)
			return err;
		c->done |= section;
		todo &= ~section;
	}
	if (c->sections & QUEUES) {
		c->failed = c->sections & QUEUES & -(c->sections & QUEUES);
		err = pmig_pending_restore(&job->tg, job->siginfos,
					   c->siginfo_count, c->sections);
		if (err)
			return err;
		c->done |= c->sections & QUEUES;
	}
	err = restore_under_lock(job);
	if (!err)
		c->failed = 0;
	return err;
}

static int run_capture(struct job *job)
{
	int err;

	err = job_alloc(job);
	if (err)
		return err;
	err = pmig_target_get(&job->tg, job->call.pidfd, true);
	if (err)
		return err;
	err = capture(job);
	pmig_target_put(&job->tg);
	return err;
}

static int run_restore(struct job *job)
{
	struct pmig_call *c = &job->call;
	u64 todo;
	int err;

	err = job_alloc(job);
	if (!err)
		err = read_restore(job);
	if (err)
		return err;
	/* Everything is looked at before anything is touched. */
	for (todo = c->sections; todo; todo &= todo - 1) {
		c->failed = todo & -todo;
		err = check_section(job, c->failed);
		if (err)
			return err;
	}
	c->failed = 0;
	err = pmig_target_get(&job->tg, c->pidfd, true);
	if (err)
		return err;
	err = restore(job);
	pmig_target_put(&job->tg);
	return err;
}

static long ioctl_pcb(void __user *arg, bool is_restore)
{
	struct job job = {};
	int err;

	err = read_sized(&job.call, sizeof(job.call), sizeof(job.call), arg);
	if (err)
		return err;
	err = job_check(&job, is_restore ? restore_sections() :
					   CAPTURE_SECTIONS);
	if (err)
		return err;
	err = is_restore ? run_restore(&job) : run_capture(&job);
	job_free(&job);
	if (write_sized(arg, &job.call, sizeof(job.call), job.call.size))
		return -EFAULT;
	return err;
}

static long pmig_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *user = (void __user *)arg;

	switch (cmd) {
	case PMIG_IOC_QUERY:
		return ioctl_query(user);
	case PMIG_IOC_CAPTURE:
		return ioctl_pcb(user, false);
	case PMIG_IOC_RESTORE:
		return ioctl_pcb(user, true);
	case PMIG_IOC_VMAS:
		return ioctl_vmas(user);
	case PMIG_IOC_DIRTY:
		return ioctl_dirty(user);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations pmig_fops = {
	.owner = THIS_MODULE,
	.open = nonseekable_open,
	.unlocked_ioctl = pmig_ioctl,
};

static struct miscdevice pmig_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "pmig",
	.fops = &pmig_fops,
	.mode = 0600,
};

static int __init pmig_init(void)
{
	pmig_resolve();
	return misc_register(&pmig_device);
}

static void __exit pmig_exit(void)
{
	misc_deregister(&pmig_device);
}

module_init(pmig_init);
module_exit(pmig_exit);

MODULE_DESCRIPTION("Capture and restore of process control blocks");
MODULE_LICENSE("GPL");
