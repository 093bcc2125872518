// SPDX-License-Identifier: GPL-2.0
/* The bounds of an address space, its executable, and the list of mappings. */
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hugetlb.h>
#include <linux/kdev_t.h>
#include <linux/pkeys.h>
#include <linux/sched/coredump.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "pmig.h"

int pmig_mm_capture(struct mm_struct *mm, struct pmig_mm *out)
{
	unsigned long flags, def_flags;

	BUILD_BUG_ON(AT_VECTOR_SIZE > PMIG_AUXV_MAX);
	if (mmap_read_lock_killable(mm))
		return -EINTR;
	spin_lock(&mm->arg_lock);
	out->start_code = mm->start_code;
	out->end_code = mm->end_code;
	out->start_data = mm->start_data;
	out->end_data = mm->end_data;
	out->start_brk = mm->start_brk;
	out->brk = mm->brk;
	out->start_stack = mm->start_stack;
	out->arg_start = mm->arg_start;
	out->arg_end = mm->arg_end;
	out->env_start = mm->env_start;
	out->env_end = mm->env_end;
	spin_unlock(&mm->arg_lock);
	out->vdso = (unsigned long)mm->context.vdso;
	memcpy(out->auxv, mm->saved_auxv, sizeof(mm->saved_auxv));
	out->auxv_count = AT_VECTOR_SIZE;
	flags = READ_ONCE(mm->flags);
	def_flags = mm->def_flags;
	mmap_read_unlock(mm);

	out->dumpable = __get_dumpable(flags);
	out->coredump_filter = (flags & MMF_DUMP_FILTER_MASK) >>
			       MMF_DUMP_FILTER_SHIFT;
	out->thp_disable = !!(flags & MMF_DISABLE_THP_MASK);
	if (def_flags & VM_LOCKED)
		out->mlock_future |= 1;
	if (def_flags & VM_LOCKONFAULT)
		out->mlock_future |= 2;
	return 0;
}

static bool ordered(u64 start, u64 end)
{
	return start <= end && pmig_user_addr(end);
}

int pmig_mm_check(const struct pmig_mm *in)
{
	u32 n = in->auxv_count;

	if (!ordered(in->start_code, in->end_code) ||
	    !ordered(in->start_data, in->end_data) ||
	    !ordered(in->start_brk, in->brk) ||
	    !ordered(in->arg_start, in->arg_end) ||
	    !ordered(in->env_start, in->env_end) ||
	    !pmig_user_addr(in->start_stack))
		return -EINVAL;
	if (in->dumpable > 2 || in->thp_disable > 1 || in->mlock_future ||
	    in->reserved ||
	    in->coredump_filter >= 1U << MMF_DUMP_FILTER_BITS)
		return -EINVAL;
	/* Readers of the vector rely on the AT_NULL at its end. */
	if (n % 2 || n > AT_VECTOR_SIZE ||
	    memchr_inv(&in->auxv[n], 0, (PMIG_AUXV_MAX - n) * sizeof(u64)) ||
	    in->auxv[AT_VECTOR_SIZE - 2] || in->auxv[AT_VECTOR_SIZE - 1])
		return -EINVAL;
	return 0;
}

int pmig_mm_restore(struct mm_struct *mm, const struct pmig_mm *in)
{
	unsigned long mask = MMF_DUMPABLE_MASK | MMF_DUMP_FILTER_MASK |
			     MMF_DISABLE_THP_MASK;
	unsigned long flags = in->dumpable |
			      in->coredump_filter << MMF_DUMP_FILTER_SHIFT;

	if (in->thp_disable)
		flags |= MMF_DISABLE_THP_MASK;
	/* For writing, since brk and /proc read these without arg_lock. */
	if (mmap_write_lock_killable(mm))
		return -EINTR;
	spin_lock(&mm->arg_lock);
	mm->start_code = in->start_code;
	mm->end_code = in->end_code;
	mm->start_data = in->start_data;
	mm->end_data = in->end_data;
	mm->start_brk = in->start_brk;
	mm->brk = in->brk;
	mm->start_stack = in->start_stack;
	mm->arg_start = in->arg_start;
	mm->arg_end = in->arg_end;
	mm->env_start = in->env_start;
	mm->env_end = in->env_end;
	spin_unlock(&mm->arg_lock);
	memcpy(mm->saved_auxv, in->auxv, sizeof(mm->saved_auxv));
	set_mask_bits(&mm->flags, mask, flags);
	mmap_write_unlock(mm);
	return 0;
}

int pmig_exe_restore(struct mm_struct *mm, int exe_fd)
{
	struct file *file, *old;
	int err;

	file = fget(exe_fd);
	if (!file)
		return -EBADF;
	err = -EACCES;
	if (!S_ISREG(file_inode(file)->i_mode) ||
	    !(file_inode(file)->i_mode & 0111) || !(file->f_mode & FMODE_READ))
		goto out;
	/* The address space holds this as long as it names the file. */
	err = exe_file_deny_write_access(file);
	if (err)
		goto out;
	if (mmap_write_lock_killable(mm)) {
		exe_file_allow_write_access(file);
		err = -EINTR;
		goto out;
	}
	old = rcu_dereference_protected(mm->exe_file, true);
	rcu_assign_pointer(mm->exe_file, file);
	mmap_write_unlock(mm);
	if (old) {
		exe_file_allow_write_access(old);
		fput(old);
	}
	return 0;
out:
	fput(file);
	return err;
}

static u64 stable_flags(unsigned long vm)
{
	static const struct {
		unsigned long kernel;
		u64 abi;
	} map[] = {
		{ VM_READ, PMIG_VM_READ },
		{ VM_WRITE, PMIG_VM_WRITE },
		{ VM_EXEC, PMIG_VM_EXEC },
		{ VM_SHARED, PMIG_VM_SHARED },
		{ VM_MAYREAD, PMIG_VM_MAYREAD },
		{ VM_MAYWRITE, PMIG_VM_MAYWRITE },
		{ VM_MAYEXEC, PMIG_VM_MAYEXEC },
		{ VM_MAYSHARE, PMIG_VM_MAYSHARE },
		{ VM_GROWSDOWN, PMIG_VM_GROWSDOWN },
		{ VM_PFNMAP, PMIG_VM_PFNMAP },
		{ VM_LOCKED, PMIG_VM_LOCKED },
		{ VM_LOCKONFAULT, PMIG_VM_LOCKONFAULT },
		{ VM_IO, PMIG_VM_IO },
		{ VM_SEQ_READ, PMIG_VM_SEQ_READ },
		{ VM_RAND_READ, PMIG_VM_RAND_READ },
		{ VM_DONTCOPY, PMIG_VM_DONTCOPY },
		{ VM_DONTEXPAND, PMIG_VM_DONTEXPAND },
		{ VM_ACCOUNT, PMIG_VM_ACCOUNT },
		{ VM_NORESERVE, PMIG_VM_NORESERVE },
		{ VM_HUGETLB, PMIG_VM_HUGETLB },
		{ VM_SYNC, PMIG_VM_SYNC },
		{ VM_WIPEONFORK, PMIG_VM_WIPEONFORK },
		{ VM_DONTDUMP, PMIG_VM_DONTDUMP },
		{ VM_SOFTDIRTY, PMIG_VM_SOFTDIRTY },
		{ VM_MIXEDMAP, PMIG_VM_MIXEDMAP },
		{ VM_HUGEPAGE, PMIG_VM_HUGEPAGE },
		{ VM_NOHUGEPAGE, PMIG_VM_NOHUGEPAGE },
		{ VM_MERGEABLE, PMIG_VM_MERGEABLE },
		{ VM_UFFD_MISSING, PMIG_VM_UFFD_MISSING },
		{ VM_UFFD_WP, PMIG_VM_UFFD_WP },
		{ VM_UFFD_MINOR, PMIG_VM_UFFD_MINOR },
		{ VM_SHADOW_STACK, PMIG_VM_SHADOW_STACK },
		{ VM_DROPPABLE, PMIG_VM_DROPPABLE },
#ifdef VM_SEALED
		{ VM_SEALED, PMIG_VM_SEALED },
#endif
	};
	unsigned long rest = vm & ~(VM_PKEY_BIT0 | VM_PKEY_BIT1 | VM_PKEY_BIT2 |
				    VM_PKEY_BIT3);
	u64 out = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(map); i++) {
		if (vm & map[i].kernel) {
			out |= map[i].abi;
			rest &= ~map[i].kernel;
		}
	}
	return rest ? out | PMIG_VM_OTHER : out;
}

static void describe_vma(struct vm_area_struct *vma, struct pmig_vma *out)
{
	const char *name = NULL;

	memset(out, 0, sizeof(*out));
	out->start = vma->vm_start;
	out->end = vma->vm_end;
	out->flags = stable_flags(vma->vm_flags);
	out->pkey = vma_pkey(vma);
	out->page_bytes = vma_kernel_pagesize(vma);
	if (vma->vm_file) {
		const struct inode *inode = file_user_inode(vma->vm_file);

		out->flags |= PMIG_VM_FILE;
		out->offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
		out->ino = inode->i_ino;
		out->dev_major = MAJOR(inode->i_sb->s_dev);
		out->dev_minor = MINOR(inode->i_sb->s_dev);
	} else if (vma->vm_ops && vma->vm_ops->name) {
		name = vma->vm_ops->name(vma);
	}
	if (name)
		strscpy(out->name, name, sizeof(out->name));
}

#define VMA_BATCH	512U

int pmig_vmas_list(struct pmig_vmas *call)
{
	struct pmig_vma __user *user = u64_to_user_ptr(call->entries);
	u64 next = call->start;
	struct pmig_target tg;
	struct pmig_vma *buf;
	u32 room, got, total = 0;
	int err;

	if (call->flags || call->reserved ||
	    call->entry_size != sizeof(*buf) || !call->count)
		return -EINVAL;
	err = pmig_target_get(&tg, call->pidfd, false);
	if (err)
		return err;
	buf = kvcalloc(min(call->count, VMA_BATCH), sizeof(*buf), GFP_KERNEL);
	if (!buf) {
		err = -ENOMEM;
		goto out;
	}
	/*
	 * Nothing is copied to the caller under the lock: a fault there could
	 * need the same lock.
	 */
	do {
		struct vm_area_struct *vma = NULL;

		room = min(call->count - total, VMA_BATCH);
		got = 0;
		err = -EINTR;
		if (mmap_read_lock_killable(tg.mm))
			break;
		if (next < TASK_SIZE_MAX) {
			VMA_ITERATOR(vmi, tg.mm, next);

			for_each_vma(vmi, vma) {
				if (got == room)
					break;
				describe_vma(vma, &buf[got++]);
			}
		}
		mmap_read_unlock(tg.mm);
		err = -EFAULT;
		if (copy_to_user(user + total, buf, got * sizeof(*buf)))
			break;
		err = 0;
		total += got;
		if (got)
			next = buf[got - 1].end;
		if (got < room || !vma) {
			next = 0;
			break;
		}
		cond_resched();
	} while (total < call->count);
	kvfree(buf);
out:
	pmig_target_put(&tg);
	call->count = total;
	call->next = err ? call->start : next;
	return err;
}
