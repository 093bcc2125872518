// SPDX-License-Identifier: GPL-2.0
/*
 * Addresses of functions that the kernel does not export.
 *
 * The restart functions are stored in a restart block, where the kernel calls
 * them indirectly; those of 6.12 keep their ENDBR.  flush_sigqueue() and
 * flush_tlb_mm_range() may have lost theirs (sealed), so they are called
 * directly, through static calls.
 */
#include <linux/kprobes.h>
#include <linux/signal.h>
#include <linux/static_call.h>
#include <linux/uaccess.h>

#include "pmig.h"

#define ENDBR_BYTES	4

struct pmig_symbols pmig_syms;

DEFINE_STATIC_CALL_NULL(pmig_flush, flush_sigqueue);
/* As <asm/tlbflush.h> has it, but for modules. */
void flush_tlb_mm_range(struct mm_struct *mm, unsigned long start,
			unsigned long end, unsigned int stride_shift,
			bool freed_tables);
DEFINE_STATIC_CALL_NULL(pmig_flush_mm, flush_tlb_mm_range);

static unsigned long lookup(const char *name)
{
	static const u8 endbr[] = { 0xf3, 0x0f, 0x1e, 0xfa };
	static const u8 sealed[] = { 0x66, 0x0f, 0x1f, 0x00 };
	struct kprobe kp = { .symbol_name = name };
	u8 before[ENDBR_BYTES];
	unsigned long addr;

	if (register_kprobe(&kp) < 0)
		return 0;
	addr = (unsigned long)kp.addr;
	unregister_kprobe(&kp);

	/* A kprobe on a function's name lands behind its ENDBR. */
	if (copy_from_kernel_nofault(before, (void *)(addr - ENDBR_BYTES),
				     sizeof(before)))
		return 0;
	if (!memcmp(before, endbr, sizeof(endbr)) ||
	    !memcmp(before, sealed, sizeof(sealed)))
		addr -= ENDBR_BYTES;
	return addr;
}

/* A function that is called indirectly must keep its ENDBR where IBT is on. */
static void *lookup_indirect(const char *name)
{
	static const u8 endbr[] = { 0xf3, 0x0f, 0x1e, 0xfa };
	unsigned long addr = lookup(name);
	u8 at[ENDBR_BYTES];

	if (!addr)
		return NULL;
	if (IS_ENABLED(CONFIG_X86_KERNEL_IBT) &&
	    (copy_from_kernel_nofault(at, (void *)addr, sizeof(at)) ||
	     memcmp(at, endbr, sizeof(endbr)))) {
		pr_warn("pmig: %s cannot be called indirectly\n", name);
		return NULL;
	}
	return (void *)addr;
}

void pmig_resolve(void)
{
	unsigned long flush = lookup("flush_sigqueue");
	unsigned long flush_mm = lookup("flush_tlb_mm_range");

	pmig_syms.nanosleep = lookup_indirect("hrtimer_nanosleep_restart");
	pmig_syms.futex = lookup_indirect("futex_wait_restart");
	pmig_syms.poll = lookup_indirect("do_restart_poll");
	pmig_syms.none = lookup_indirect("do_no_restart_syscall");
	pmig_syms.cpu_sleep = lookup_indirect("posix_cpu_nsleep_restart");
	if (flush) {
		static_call_update(pmig_flush, (void *)flush);
		pmig_syms.flush = true;
	}
	if (flush_mm) {
		static_call_update(pmig_flush_mm, (void *)flush_mm);
		pmig_syms.flush_tlb = true;
	}
}

void pmig_flush_sigqueue(struct sigpending *queue)
{
	static_call_cond(pmig_flush)(queue);
}

void pmig_flush_tlb(struct mm_struct *mm, unsigned long start,
		    unsigned long end)
{
	static_call_cond(pmig_flush_mm)(mm, start, end, PAGE_SHIFT, false);
}
