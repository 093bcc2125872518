// SPDX-License-Identifier: GPL-2.0
/*
 * Which pages of an address space were written, by the dirty bits of its page
 * tables.
 *
 * A page's word says which page it is as well: what was discarded, or mapped or
 * moved there since, is another one, whatever its bits say.  Two looks at the
 * same page that find it unwritten found the same bytes, if nobody wrote to it
 * but by these page tables.  Who holds a page pinned does not write by them:
 * such pages are told apart.  One that was pinned and let go between two looks
 * is not, nor one that was swapped out and in; pmig_abi.h says so.
 *
 * The dirty bit also tells reclaim what must be written to swap.  So before it
 * is taken off, the folio is marked, under the lock of the page table.
 */
#include <linux/mm.h>
#include <linux/mm_inline.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_notifier.h>
#include <linux/page-flags.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "pmig.h"

/* Pages whose words are gathered under one hold of mmap_lock. */
#define CHUNK		(32UL * PTRS_PER_PTE)

/* Mappings whose page tables do not hold ordinary pages. */
#define STRANGE		(VM_IO | VM_PFNMAP | VM_MIXEDMAP | VM_HUGETLB |	\
			 VM_SHADOW_STACK)

struct look {
	struct mm_struct *mm;
	u64 *words;			/* of the pages from `first` on */
	unsigned long first;
	bool clean;
	bool mergeable;			/* the mapping that is looked at */
	/* What the processors may still know as dirty. */
	unsigned long flush_start, flush_end;
};

static void note(struct look *l, unsigned long addr, u64 word)
{
	l->words[(addr - l->first) >> PAGE_SHIFT] = word;
}

static void note_all(struct look *l, unsigned long addr, unsigned long end,
		     u64 word)
{
	for (; addr < end; addr += PAGE_SIZE)
		note(l, addr, word);
}

static void flush_later(struct look *l, unsigned long start, unsigned long end)
{
	l->flush_start = min(l->flush_start, start);
	l->flush_end = max(l->flush_end, end);
}

/*
 * What a page's word says beside its number.  Held are, besides the pinned, those
 * whose entries others clean: reclaim on their way to swap and back,
 * madvise(MADV_FREE), and the search for pages to be merged.
 */
static u64 state_of(struct look *l, struct folio *folio, bool dirty)
{
	u64 word = PMIG_PAGE_PRESENT;

	if (dirty)
		word |= PMIG_PAGE_WRITTEN;
	if (l->mergeable || folio_maybe_dma_pinned(folio) ||
	    folio_test_swapcache(folio) ||
	    (folio_test_anon(folio) && !folio_test_swapbacked(folio)))
		word |= PMIG_PAGE_HELD;
	return word;
}

/* Only these are a process's own to be cleaned. */
static bool may_clean(struct folio *folio)
{
	return folio_test_anon(folio) && !folio_test_ksm(folio);
}

static void look_at_pte(struct look *l, unsigned long addr, pte_t *ptep)
{
	pte_t old = ptep_get(ptep);
	struct folio *folio;
	pte_t new;
	u64 word;

	if (pte_none(old)) {
		note(l, addr, 0);
		return;
	}
	if (!pte_present(old)) {
		/* In swap, on its way, or a marker. */
		note(l, addr, PMIG_PAGE_HELD);
		return;
	}
	word = pte_pfn(old);
	if (pte_special(old)) {
		/* The page of zeros. */
		note(l, addr, word | PMIG_PAGE_PRESENT);
		return;
	}
	if (!pfn_valid(pte_pfn(old))) {
		note(l, addr, PMIG_PAGE_HELD);
		return;
	}
	folio = page_folio(pfn_to_page(pte_pfn(old)));
	if (!l->clean || !pte_dirty(old) || !may_clean(folio)) {
		note(l, addr, word | state_of(l, folio, pte_dirty(old)));
		return;
	}
	if (!folio_test_dirty(folio))
		folio_mark_dirty(folio);
	/* The processors set bits meanwhile; all others need our lock. */
	do {
		new = pte_mkclean(old);
	} while (!try_cmpxchg((long *)&ptep->pte, (long *)&old,
			      *(long *)&new));
	note(l, addr, word | state_of(l, folio, true));
	flush_later(l, addr, addr + PAGE_SIZE);
}

/* False if there is a page table by now. */
static bool look_at_huge(struct look *l, unsigned long addr, unsigned long end,
			 pmd_t *pmdp)
{
	unsigned long base = addr & PMD_MASK;
	spinlock_t *ptl = pmd_lock(l->mm, pmdp);
	struct folio *folio;
	pmd_t old = pmdp_get(pmdp);
	pmd_t new;
	u64 word, pfn;

	if (!pmd_present(old)) {
		note_all(l, addr, end, pmd_none(old) ? 0 : PMIG_PAGE_HELD);
		goto out;
	}
	if (!pmd_leaf(old)) {
		spin_unlock(ptl);
		return false;
	}
	if (pmd_devmap(old) || !pfn_valid(pmd_pfn(old))) {
		note_all(l, addr, end, PMIG_PAGE_HELD);
		goto out;
	}
	folio = page_folio(pfn_to_page(pmd_pfn(old)));
	word = state_of(l, folio, pmd_dirty(old));
	/* What was written of it outside the range must not be forgotten. */
	if (l->clean && pmd_dirty(old) && may_clean(folio) &&
	    addr == base && end == base + PMD_SIZE) {
		if (!folio_test_dirty(folio))
			folio_mark_dirty(folio);
		do {
			new = pmd_mkclean(old);
		} while (!try_cmpxchg((long *)pmdp, (long *)&old,
				      *(long *)&new));
		flush_later(l, addr, end);
	}
	pfn = pmd_pfn(old) + ((addr - base) >> PAGE_SHIFT);
	for (; addr < end; addr += PAGE_SIZE)
		note(l, addr, word | pfn++);
out:
	spin_unlock(ptl);
	return true;
}

/* A range within one entry of the middle directory. */
static void look_at_pmd(struct look *l, unsigned long addr, unsigned long end,
			pmd_t *pmdp)
{
	spinlock_t *ptl;
	pte_t *ptep;
	pmd_t pmd;

again:
	/* A page table that is taken away meanwhile is freed by RCU. */
	rcu_read_lock();
	pmd = pmdp_get_lockless(pmdp);
	if (pmd_none(pmd)) {
		rcu_read_unlock();
		return;
	}
	if (!pmd_present(pmd) || pmd_leaf(pmd)) {
		rcu_read_unlock();
		if (look_at_huge(l, addr, end, pmdp))
			return;
		goto again;
	}
	if (pmd_bad(pmd)) {
		rcu_read_unlock();
		note_all(l, addr, end, PMIG_PAGE_HELD);
		return;
	}
	ptl = pte_lockptr(l->mm, &pmd);
	ptep = pte_offset_kernel(&pmd, addr);
	spin_lock(ptl);
	if (!pmd_same(pmd, pmdp_get_lockless(pmdp))) {
		spin_unlock(ptl);
		rcu_read_unlock();
		goto again;
	}
	for (; addr < end; addr += PAGE_SIZE, ptep++)
		look_at_pte(l, addr, ptep);
	spin_unlock(ptl);
	rcu_read_unlock();
}

/* A range within one mapping. */
static void look_at_range(struct look *l, unsigned long addr, unsigned long end)
{
	unsigned long next;
	pgd_t *pgd;
	p4d_t *p4d;
	pud_t *pud;

	for (; addr < end; addr = next) {
		pgd = pgd_offset(l->mm, addr);
		next = pgd_addr_end(addr, end);
		if (pgd_none(READ_ONCE(*pgd)))
			continue;
		p4d = p4d_offset(pgd, addr);
		next = p4d_addr_end(addr, end);
		if (p4d_none(READ_ONCE(*p4d)))
			continue;
		pud = pud_offset(p4d, addr);
		next = pud_addr_end(addr, end);
		if (pud_none(READ_ONCE(*pud)))
			continue;
		next = pmd_addr_end(addr, end);
		if (pud_leaf(READ_ONCE(*pud)) || pud_bad(READ_ONCE(*pud))) {
			note_all(l, addr, next, PMIG_PAGE_HELD);
			continue;
		}
		look_at_pmd(l, addr, next, pmd_offset(pud, addr));
		cond_resched();
	}
}

/* Under mmap_lock, so that mappings and the upper tables stay. */
static int look_at_chunk(struct look *l, unsigned long end)
{
	struct vm_area_struct *vma;
	unsigned long from, to;
	VMA_ITERATOR(vmi, l->mm, l->first);

	/*
	 * Other processors (a virtual machine's, a device's) write by tables of
	 * their own.  None can be added while we hold the lock.
	 */
	if (mm_has_notifiers(l->mm))
		return -EOPNOTSUPP;
	l->flush_start = ULONG_MAX;
	l->flush_end = 0;
	inc_tlb_flush_pending(l->mm);
	for_each_vma_range(vmi, vma, end) {
		from = max(l->first, vma->vm_start);
		to = min(end, vma->vm_end);
		l->mergeable = vma->vm_flags & VM_MERGEABLE;
		if (vma->vm_flags & STRANGE)
			note_all(l, from, to, PMIG_PAGE_HELD);
		else
			look_at_range(l, from, to);
	}
	/*
	 * Before anybody reads what was told as written: until then it may go on
	 * being written to by entries that the processors remember as dirty.
	 */
	if (l->flush_end > l->flush_start)
		pmig_flush_tlb(l->mm, l->flush_start, l->flush_end);
	dec_tlb_flush_pending(l->mm);
	return 0;
}

int pmig_dirty_look(struct pmig_dirty *call)
{
	u64 __user *user = u64_to_user_ptr(call->pages);
	struct look l = { .clean = call->flags & PMIG_DIRTY_CLEAN };
	unsigned long at, end, pages;
	struct pmig_target tg;
	int err;

	if (call->flags & ~PMIG_DIRTY_CLEAN || call->reserved ||
	    call->start >= call->end || call->end > TASK_SIZE_MAX ||
	    (call->start | call->end) & ~PAGE_MASK)
		return -EINVAL;
	if (!pmig_syms.flush_tlb)
		return -EOPNOTSUPP;
	/* As /proc/PID/pagemap: where pages lie is not for everybody. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = pmig_target_get(&tg, call->pidfd, false);
	if (err)
		return err;
	l.mm = tg.mm;
	pages = (call->end - call->start) >> PAGE_SHIFT;
	l.words = kvcalloc(min(pages, CHUNK), sizeof(u64), GFP_KERNEL);
	if (!l.words) {
		err = -ENOMEM;
		goto out;
	}
	for (at = call->start; at < call->end; at = end) {
		/* A huge page is never cut in two by us. */
		end = min((at & PMD_MASK) + CHUNK * PAGE_SIZE,
			  (unsigned long)call->end);
		pages = (end - at) >> PAGE_SHIFT;
		memset(l.words, 0, pages * sizeof(u64));
		l.first = at;
		err = -EINTR;
		if (fatal_signal_pending(current) ||
		    mmap_read_lock_killable(l.mm))
			break;
		err = look_at_chunk(&l, end);
		mmap_read_unlock(l.mm);
		if (err)
			break;
		err = -EFAULT;
		if (copy_to_user(user, l.words, pages * sizeof(u64)))
			break;
		err = 0;
		user += pages;
		cond_resched();
	}
	kvfree(l.words);
out:
	pmig_target_put(&tg);
	return err;
}
