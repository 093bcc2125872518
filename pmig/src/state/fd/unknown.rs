//! Descriptors no room claims, called by their names.

use super::look::Subject;
use crate::error::Obstacle;
use crate::state::paths::is_special;

/// What stands in the way whatever the descriptor is of.
pub(super) fn common(s: &Subject<'_>) -> Option<Obstacle> {
    let close = "let the program close it first";
    if s.flags & libc::O_PATH != 0 {
        return Some(s.obstacle("was opened with O_PATH, which cannot be carried yet", close));
    }
    if s.locked {
        return Some(s.obstacle(
            "holds a file lock or lease",
            "let the program release it first",
        ));
    }
    if s.flags & libc::O_ASYNC != 0 {
        return Some(s.obstacle(
            "sends a signal when it gets ready (O_ASYNC)",
            "let the program turn that off first",
        ));
    }
    let data = [libc::S_IFREG, libc::S_IFDIR].contains(&s.nature.file_type());
    if data && s.has_path() && is_special(s.nature.magic) {
        return Some(s.obstacle(
            "is a file the kernel makes, which tells of this machine",
            close,
        ));
    }
    None
}

/// Why a descriptor that no room claims cannot be carried.
pub(super) fn refuse(s: &Subject<'_>) -> Obstacle {
    let link = s.link;
    let starts = |p: &str| link.starts_with(p.as_bytes());
    let close = "let the program close it first";
    if starts("socket:") {
        return s.obstacle("is a socket, which cannot be carried yet", close);
    }
    if starts("/memfd:") {
        return s.obstacle("is memory without a name (memfd)", close);
    }
    if starts("/dmabuf:") {
        return s.obstacle("is a buffer shared with a device", close);
    }
    if starts("anon_inode:") || starts("pidfd:") {
        let kind = [
            ("eventfd", "an eventfd"),
            ("timerfd", "a timerfd"),
            ("eventpoll", "an epoll instance"),
            ("signalfd", "a signalfd"),
            ("fanotify", "a fanotify group"),
            ("inotify", "an inotify instance"),
            ("pidfd", "a handle on a process (pidfd)"),
            ("userfaultfd", "a userfaultfd"),
            ("io_uring", "an io_uring"),
            ("perf_event", "a performance event"),
            ("bpf", "a bpf object"),
            ("kvm", "a virtual machine"),
            ("seccomp", "a seccomp listener"),
            ("landlock", "a landlock ruleset"),
            ("secretmem", "secret memory"),
            ("dma", "a buffer shared with a device"),
        ]
        .into_iter()
        .find(|(word, _)| link.windows(word.len()).any(|w| w == word.as_bytes()))
        .map_or("a kernel object of a kind pmig does not know", |(_, is)| is);
        return s.obstacle(format!("is {kind}, which cannot be carried yet"), close);
    }
    match s.nature.file_type() {
        libc::S_IFCHR if s.nature.rdev == nix::sys::stat::makedev(5, 2) => s.obstacle(
            "is the other end of a terminal that programs run in",
            "move what runs in it, not what shows it",
        ),
        libc::S_IFCHR => s.obstacle(
            "is a device that exists only on this machine",
            "close it first",
        ),
        libc::S_IFBLK => s.obstacle("is a disk of this machine", "close it first"),
        libc::S_IFIFO => s.obstacle("is a named pipe, which cannot be carried yet", close),
        libc::S_IFSOCK => s.obstacle("is a socket, which cannot be carried yet", close),
        _ => s.obstacle("is of a kind pmig does not know", close),
    }
}
