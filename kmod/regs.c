// SPDX-License-Identifier: GPL-2.0
/*
 * Registers, through the same regsets that ptrace uses: their setters refuse
 * what a CPU must not be loaded with.  With a kernel buffer they do not sleep.
 */
#include <linux/elf.h>
#include <linux/ptrace.h>
#include <linux/regset.h>
#include <linux/user.h>
#include <asm/segment.h>

#include "pmig.h"

static const struct user_regset *find_regset(struct task_struct *task, u32 note)
{
	const struct user_regset_view *view = task_user_regset_view(task);
	unsigned int i;

	if (view->e_machine != EM_X86_64)
		return NULL;
	for (i = 0; i < view->n; i++)
		if (view->regsets[i].core_note_type == note)
			return &view->regsets[i];
	return NULL;
}

u32 pmig_xstate_bytes(struct task_struct *task)
{
	const struct user_regset *rs = find_regset(task, NT_X86_XSTATE);

	return rs ? rs->n * rs->size : 0;
}

int pmig_regs_capture(struct task_struct *task, struct pmig_regs *out)
{
	const struct user_regset *rs = find_regset(task, NT_PRSTATUS);
	int got;

	BUILD_BUG_ON(sizeof(*out) != sizeof(struct user_regs_struct));
	BUILD_BUG_ON(offsetof(struct pmig_regs, orig_rax) !=
		     offsetof(struct user_regs_struct, orig_ax));
	BUILD_BUG_ON(offsetof(struct pmig_regs, gs) !=
		     offsetof(struct user_regs_struct, gs));
	if (!rs)
		return -ENOEXEC;
	got = regset_get(task, rs, sizeof(*out), out);
	if (got < 0)
		return got;
	return got == sizeof(*out) ? 0 : -EIO;
}

int pmig_regs_check(const struct pmig_regs *in)
{
	/* A 64-bit task stays one: nothing here knows the other layout. */
	if (in->cs != __USER_CS)
		return -EINVAL;
	if (!pmig_user_addr(in->fs_base) || !pmig_user_addr(in->gs_base))
		return -EINVAL;
	return 0;
}

int pmig_regs_restore(struct task_struct *task, const struct pmig_regs *in)
{
	const struct user_regset *rs = find_regset(task, NT_PRSTATUS);
	struct pmig_regs old;
	int err;

	if (!rs || !rs->set)
		return -ENOEXEC;
	err = pmig_regs_capture(task, &old);
	if (err)
		return err;
	err = rs->set(task, rs, 0, sizeof(*in), in, NULL);
	if (err) {
		/* The setter goes field by field and stops at a bad one. */
		rs->set(task, rs, 0, sizeof(old), &old, NULL);
		return -EINVAL;
	}
	return 0;
}

int pmig_xstate_capture(struct task_struct *task, void *buf, u32 bytes)
{
	const struct user_regset *rs = find_regset(task, NT_X86_XSTATE);
	int got;

	if (!rs || rs->n * rs->size != bytes)
		return -EINVAL;
	got = regset_get(task, rs, bytes, buf);
	if (got < 0)
		return got;
	return got == bytes ? 0 : -EIO;
}

int pmig_xstate_restore(struct task_struct *task, const void *buf, u32 bytes)
{
	const struct user_regset *rs = find_regset(task, NT_X86_XSTATE);
	int err;

	if (!rs || !rs->set || rs->n * rs->size != bytes)
		return -EINVAL;
	err = rs->set(task, rs, 0, bytes, buf, NULL);
	return err ? -EINVAL : 0;
}
