//! Rust mirror of `kmod/pmig_abi.h`, field by field. That header gives the
//! meaning, units and errors; a test compares both with the help of a C
//! compiler.

/// Where a field lies: name, offset and size in bytes.
pub type FieldLayout = (&'static str, usize, usize);

/// A structure's name in C, its size in bytes, and its fields.
pub type StructLayout = (&'static str, usize, Vec<FieldLayout>);

macro_rules! abi_structs {
    ($($(#[$doc:meta])* $name:ident = $c:literal { $($field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            #[allow(missing_docs)]
            pub struct $name { $(pub $field: $ty,)* }

            impl Default for $name {
                fn default() -> Self {
                    // SAFETY: integers and arrays of them; zero is a value of each.
                    unsafe { std::mem::zeroed() }
                }
            }
        )*

        /// Every structure's layout, for the comparison with the header.
        pub fn struct_layouts() -> Vec<StructLayout> {
            vec![$((
                $c,
                std::mem::size_of::<$name>(),
                vec![$((
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    {
                        let of = |s: &$name| std::mem::size_of_val(&s.$field);
                        of(&$name::default())
                    },
                ),)*],
            ),)*]
        }
    };
}

macro_rules! abi_consts {
    ($($name:ident: $ty:ty = $value:expr;)*) => {
        $(
            #[doc = concat!("`PMIG_", stringify!($name), "` in `pmig_abi.h`.")]
            pub const $name: $ty = $value;
        )*

        /// Every numeric constant, for the comparison with the header.
        pub fn constants() -> Vec<(&'static str, u64)> {
            vec![$((concat!("PMIG_", stringify!($name)), $name as u64),)*]
        }
    };
}

abi_consts! {
    ABI_VERSION: u32 = 1;
    IOC_QUERY: u32 = 0xb701;
    IOC_CAPTURE: u32 = 0xb702;
    IOC_RESTORE: u32 = 0xb703;
    IOC_VMAS: u32 = 0xb704;
    IOC_DIRTY: u32 = 0xb705;
    SEC_REGS: u64 = 1 << 0;
    SEC_XSTATE: u64 = 1 << 1;
    SEC_SIGMASK: u64 = 1 << 2;
    SEC_ALTSTACK: u64 = 1 << 3;
    SEC_PENDING: u64 = 1 << 4;
    SEC_RESTART: u64 = 1 << 5;
    SEC_SCHED: u64 = 1 << 6;
    SEC_COMM: u64 = 1 << 7;
    SEC_TIDS: u64 = 1 << 8;
    SEC_RSEQ: u64 = 1 << 9;
    SEC_PRCTL: u64 = 1 << 10;
    SEC_SIGACTIONS: u64 = 1 << 16;
    SEC_SHARED_PENDING: u64 = 1 << 17;
    SEC_MM: u64 = 1 << 18;
    SEC_EXE: u64 = 1 << 19;
    SEC_OOM: u64 = 1 << 20;
    SEC_ITIMERS: u64 = 1 << 21;
    SEC_OWN: u64 = 1 << 32;
    SEC_INFO: u64 = 1 << 33;
    FEAT_VMAS: u64 = 1 << 0;
    FEAT_DIRTY: u64 = 1 << 1;
    DIRTY_CLEAN: u32 = 1 << 0;
    PAGE_PRESENT: u64 = 1 << 61;
    PAGE_HELD: u64 = 1 << 62;
    PAGE_WRITTEN: u64 = 1 << 63;
    NSIG: u32 = 64;
    SI_SHARED: u32 = 1 << 0;
    SI_BARE: u32 = 1 << 1;
    SI_TIMER: u32 = 1 << 2;
    RESTART_NONE: u32 = 0;
    RESTART_NANOSLEEP: u32 = 1;
    RESTART_FUTEX: u32 = 2;
    RESTART_POLL: u32 = 3;
    RESTART_CPU_SLEEP: u32 = 4;
    RESTART_OTHER: u32 = 5;
    FUTEX_SHARED: u32 = 1 << 0;
    FUTEX_CLOCKRT: u32 = 1 << 1;
    FUTEX_TIMEOUT: u32 = 1 << 2;
    FOREVER: u64 = 0x7fffffffffffffff;
    AUXV_MAX: u32 = 64;
    STOP_PTRACE: u32 = 1;
    STOP_GROUP: u32 = 2;
    STOP_FREEZER: u32 = 3;
    HAS_SECCOMP: u64 = 1 << 0;
    HAS_IO_PORTS: u64 = 1 << 1;
    HAS_LDT: u64 = 1 << 2;
    HAS_TLS_DESC: u64 = 1 << 3;
    HAS_BREAKPOINTS: u64 = 1 << 4;
    HAS_POSIX_TIMERS: u64 = 1 << 5;
    HAS_IO_URING: u64 = 1 << 6;
    HAS_SHADOW_STACK: u64 = 1 << 7;
    HAS_SEM_UNDO: u64 = 1 << 8;
    HAS_AIO: u64 = 1 << 9;
    HAS_PERF_EVENTS: u64 = 1 << 10;
    HAS_UPROBES: u64 = 1 << 11;
    HAS_NO_TSC: u64 = 1 << 12;
    HAS_NO_CPUID: u64 = 1 << 13;
    HAS_DISPATCH: u64 = 1 << 14;
    HAS_PI_FUTEX: u64 = 1 << 15;
    HAS_SHARED_MM: u64 = 1 << 16;
    HAS_SHARED_SIGHAND: u64 = 1 << 17;
    HAS_MDWE: u64 = 1 << 18;
    HAS_KSM: u64 = 1 << 19;
    HAS_SPECULATION: u64 = 1 << 20;
    HAS_LAM: u64 = 1 << 21;
    HAS_IO_FLUSHER: u64 = 1 << 22;
    VM_READ: u64 = 1 << 0;
    VM_WRITE: u64 = 1 << 1;
    VM_EXEC: u64 = 1 << 2;
    VM_SHARED: u64 = 1 << 3;
    VM_MAYREAD: u64 = 1 << 4;
    VM_MAYWRITE: u64 = 1 << 5;
    VM_MAYEXEC: u64 = 1 << 6;
    VM_MAYSHARE: u64 = 1 << 7;
    VM_GROWSDOWN: u64 = 1 << 8;
    VM_PFNMAP: u64 = 1 << 9;
    VM_LOCKED: u64 = 1 << 10;
    VM_LOCKONFAULT: u64 = 1 << 11;
    VM_IO: u64 = 1 << 12;
    VM_SEQ_READ: u64 = 1 << 13;
    VM_RAND_READ: u64 = 1 << 14;
    VM_DONTCOPY: u64 = 1 << 15;
    VM_DONTEXPAND: u64 = 1 << 16;
    VM_ACCOUNT: u64 = 1 << 17;
    VM_NORESERVE: u64 = 1 << 18;
    VM_HUGETLB: u64 = 1 << 19;
    VM_SYNC: u64 = 1 << 20;
    VM_WIPEONFORK: u64 = 1 << 21;
    VM_DONTDUMP: u64 = 1 << 22;
    VM_SOFTDIRTY: u64 = 1 << 23;
    VM_MIXEDMAP: u64 = 1 << 24;
    VM_HUGEPAGE: u64 = 1 << 25;
    VM_NOHUGEPAGE: u64 = 1 << 26;
    VM_MERGEABLE: u64 = 1 << 27;
    VM_UFFD_MISSING: u64 = 1 << 28;
    VM_UFFD_WP: u64 = 1 << 29;
    VM_UFFD_MINOR: u64 = 1 << 30;
    VM_SHADOW_STACK: u64 = 1 << 31;
    VM_DROPPABLE: u64 = 1 << 32;
    VM_SEALED: u64 = 1 << 33;
    VM_OTHER: u64 = 1 << 62;
    VM_FILE: u64 = 1 << 63;
}

abi_structs! {
    /// What the module is and can do.
    Query = "pmig_query" {
        size: u32,
        flags: u32,
        abi_version: u32,
        xstate_size: u32,
        features: u64,
        capture_sections: u64,
        restore_sections: u64,
        pcb_size: u32,
        max_siginfos: u32,
    }
    /// One capture or restore.
    Call = "pmig_call" {
        size: u32,
        flags: u32,
        pidfd: i32,
        exe_fd: i32,
        sections: u64,
        done: u64,
        failed: u64,
        pcb: u64,
        xstate: u64,
        siginfos: u64,
        pcb_size: u32,
        xstate_size: u32,
        siginfo_count: u32,
        reserved: u32,
    }
    /// General registers, as `struct user_regs_struct`.
    Regs = "pmig_regs" {
        r15: u64,
        r14: u64,
        r13: u64,
        r12: u64,
        rbp: u64,
        rbx: u64,
        r11: u64,
        r10: u64,
        r9: u64,
        r8: u64,
        rax: u64,
        rcx: u64,
        rdx: u64,
        rsi: u64,
        rdi: u64,
        orig_rax: u64,
        rip: u64,
        cs: u64,
        eflags: u64,
        rsp: u64,
        ss: u64,
        fs_base: u64,
        gs_base: u64,
        ds: u64,
        es: u64,
        fs: u64,
        gs: u64,
    }
    /// One signal's action, as the kernel keeps it.
    Sigaction = "pmig_sigaction" {
        handler: u64,
        flags: u64,
        restorer: u64,
        mask: u64,
    }
    /// Blocked signals; `saved` holds the real mask if `has_saved` (a call with a temporary mask was interrupted).
    Sigmask = "pmig_sigmask" {
        blocked: u64,
        saved: u64,
        has_saved: u32,
        reserved: u32,
    }
    /// The alternate signal stack (sigaltstack(2)).
    Altstack = "pmig_altstack" {
        sp: u64,
        bytes: u64,
        flags: u32,
        reserved: u32,
    }
    /// A pending signal.
    Siginfo = "pmig_siginfo" {
        signo: u32,
        flags: u32,
        info: [u8; 128],
    }
    /// What restart_syscall(2) goes on with; times in ns on the host's own clock.
    Restart = "pmig_restart" {
        kind: u32,
        clockid: i32,
        deadline_ns: u64,
        now_ns: u64,
        uaddr: u64,
        has_rmtp: u32,
        has_timeout: u32,
        nfds: u32,
        futex_val: u32,
        futex_flags: u32,
        futex_bitset: u32,
    }
    /// Bounds of the address space and the auxiliary vector.
    Mm = "pmig_mm" {
        start_code: u64,
        end_code: u64,
        start_data: u64,
        end_data: u64,
        start_brk: u64,
        brk: u64,
        start_stack: u64,
        arg_start: u64,
        arg_end: u64,
        env_start: u64,
        env_end: u64,
        vdso: u64,
        dumpable: u32,
        coredump_filter: u32,
        thp_disable: u32,
        mlock_future: u32,
        auxv_count: u32,
        reserved: u32,
        auxv: [u64; AUXV_MAX as usize],
    }
    /// Scheduling attributes (sched_setattr(2)) and timer slack, ns.
    Sched = "pmig_sched" {
        policy: u32,
        nice: i32,
        rt_priority: u32,
        flags: u32,
        runtime_ns: u64,
        deadline_ns: u64,
        period_ns: u64,
        timer_slack_ns: u64,
        default_timer_slack_ns: u64,
    }
    /// The task's name, ending in a zero byte.
    Comm = "pmig_comm" {
        comm: [u8; 16],
    }
    /// Robust list head and the two tid addresses.
    Tids = "pmig_tids" {
        robust_list: u64,
        set_child_tid: u64,
        clear_child_tid: u64,
    }
    /// The rseq(2) registration.
    Rseq = "pmig_rseq" {
        ptr: u64,
        len: u32,
        sig: u32,
    }
    /// Small per-thread settings of prctl(2) and personality(2).
    Prctl = "pmig_prctl" {
        pdeath_signal: u32,
        personality: u32,
        no_new_privs: u32,
        reserved: u32,
    }
    /// The OOM score adjustment.
    Oom = "pmig_oom" {
        score_adj: i32,
        score_adj_min: i32,
    }
    /// One interval timer, ns.
    Itimer = "pmig_itimer" {
        value_ns: u64,
        interval_ns: u64,
    }
    /// The interval timers (setitimer(2)).
    Itimers = "pmig_itimers" {
        real: Itimer,
        virt_armed: u32,
        prof_armed: u32,
    }
    /// What only the task itself may set (prctl(2)).
    Own = "pmig_own" {
        securebits: u32,
        child_subreaper: u32,
    }
    /// Identity, how it is stopped, clocks, and what else it has (`HAS_*`).
    Info = "pmig_info" {
        pid: u32,
        tgid: u32,
        nr_threads: u32,
        stop: u32,
        has: u64,
        start_monotonic_ns: u64,
        start_boottime_ns: u64,
        now_monotonic_ns: u64,
        now_boottime_ns: u64,
        now_realtime_ns: u64,
    }
    /// The whole process control block.
    Pcb = "pmig_pcb" {
        size: u32,
        flags: u32,
        info: Info,
        regs: Regs,
        sigmask: Sigmask,
        altstack: Altstack,
        restart: Restart,
        sched: Sched,
        comm: Comm,
        tids: Tids,
        rseq: Rseq,
        prctl: Prctl,
        oom: Oom,
        itimers: Itimers,
        own: Own,
        mm: Mm,
        sigactions: [Sigaction; NSIG as usize],
    }
    /// One listing of mappings.
    Vmas = "pmig_vmas" {
        size: u32,
        flags: u32,
        pidfd: i32,
        entry_size: u32,
        start: u64,
        entries: u64,
        count: u32,
        reserved: u32,
        next: u64,
    }
    /// One mapping; the name is that of a special mapping such as `[vdso]`.
    Vma = "pmig_vma" {
        start: u64,
        end: u64,
        flags: u64,
        offset: u64,
        ino: u64,
        dev_major: u32,
        dev_minor: u32,
        pkey: u32,
        page_bytes: u32,
        name: [u8; 32],
    }
    /// One look at what was written.
    Dirty = "pmig_dirty" {
        size: u32,
        flags: u32,
        pidfd: i32,
        reserved: u32,
        start: u64,
        end: u64,
        pages: u64,
    }
}
