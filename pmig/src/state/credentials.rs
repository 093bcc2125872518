//! Who the process is and what it may do (credentials(7), capabilities(7)).

use serde::{Deserialize, Serialize};

use super::words::bytes_of;
use crate::error::{Error, Obstacle, Result};
use crate::proc::status::Status;
use crate::tracee::{Batch, Call, Done};

/// Real, effective, saved and file system id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    pub real: u32,
    pub effective: u32,
    pub saved: u32,
    pub fs: u32,
}

/// Capability sets, a bit for each capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub permitted: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub ambient: u64,
    pub bounding: u64,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    pub uid: Ids,
    pub gid: Ids,
    pub groups: Vec<u32>,
    pub capabilities: Capabilities,
    /// PR_GET_SECUREBITS, SECBIT_KEEP_CAPS and locks included.
    pub securebits: u32,
    pub no_new_privs: bool,
}

const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
/// Every second bit locks the one below it (`<linux/securebits.h>`).
const SECBIT_LOCKS: u32 = 0b1010_1010;
const ALL_SECBITS: u32 = 0xfff;
const CAPABILITY_VERSION_3: u64 = 0x2008_0522;
/// NGROUPS_MAX.
const MAX_GROUPS: usize = 65_536;

impl Credentials {
    pub fn ask(batch: &mut Batch) -> Call {
        batch.call(
            "read the securebits",
            libc::SYS_prctl,
            &[libc::PR_GET_SECUREBITS.into()],
        )
    }

    pub fn capture(status: &Status, securebits: Call, done: &Done) -> Credentials {
        Credentials {
            securebits: done.result(securebits) as u32,
            ..Credentials::from_status(status)
        }
    }

    /// All but the securebits, which no file tells.
    pub fn from_status(status: &Status) -> Credentials {
        let s = status;
        let ids = |[real, effective, saved, fs]: [u32; 4]| Ids {
            real,
            effective,
            saved,
            fs,
        };
        Credentials {
            uid: ids(s.uids),
            gid: ids(s.gids),
            groups: s.groups.clone(),
            capabilities: Capabilities {
                permitted: s.permitted,
                effective: s.effective,
                inheritable: s.inheritable,
                ambient: s.ambient,
                bounding: s.bounding,
            },
            securebits: 0,
            no_new_privs: s.no_new_privs,
        }
    }

    /// What stands in the way when a process that starts with `given` shall
    /// get these.
    pub fn obstacles(&self, given: &Credentials) -> Vec<Obstacle> {
        let (c, g) = (&self.capabilities, &given.capabilities);
        let mut all = Vec::new();
        let mut lacks = |want: u64, have: u64, set: &str| {
            let missing = want & !have;
            if missing != 0 {
                all.push(Obstacle::new(
                    format!("capabilities ({set})"),
                    format!("the target cannot give {}", capability_names(missing)),
                    "start pmig serve with them, or drop them in the program",
                ));
            }
        };
        lacks(c.permitted, g.permitted, "permitted");
        lacks(c.bounding, g.bounding, "bounding");
        lacks(c.inheritable, g.bounding | g.inheritable, "inheritable");
        let locked = given.securebits & SECBIT_LOCKS;
        let fixed = locked | locked >> 1;
        if (self.securebits ^ given.securebits) & fixed != 0 {
            all.push(Obstacle::new(
                "securebits",
                format!(
                    "the target's are locked at {:#x}, the program has {:#x}",
                    given.securebits, self.securebits
                ),
                "start pmig serve without locked securebits",
            ));
        }
        if given.no_new_privs && !self.no_new_privs {
            all.push(Obstacle::new(
                "no-new-privs",
                "pmig serve runs with it, and a process cannot lose it",
                "start pmig serve without NoNewPrivileges",
            ));
        }
        all
    }

    /// # Errors
    /// [`Error::Bad`] for sets that no kernel allows.
    pub fn check(&self) -> Result<()> {
        let c = &self.capabilities;
        let sound = c.effective & !c.permitted == 0
            && c.ambient & !(c.permitted & c.inheritable) == 0
            && self.securebits & !ALL_SECBITS == 0
            && self.groups.len() <= MAX_GROUPS;
        if sound {
            Ok(())
        } else {
            Err(Error::bad("credentials", "not what a kernel tells"))
        }
    }

    /// Turns a root process with the credentials `now` into what this says.
    ///
    /// The order matters: ids change while securebits keep the capabilities
    /// from being fixed up; the inheritable set may hold what the bounding set
    /// no longer does, so it comes first; each set is dropped only when
    /// nothing further needs it.
    ///
    /// # Errors
    /// As [`Credentials::check`].
    pub fn restore(&self, batch: &mut Batch, now: &Credentials) -> Result<()> {
        self.check()?;
        let c = &self.capabilities;
        if self.same_identity(now) && self.securebits == now.securebits {
            self.restore_no_new_privs(batch, now);
            return Ok(());
        }
        prctl(
            batch,
            "keep capabilities for the change of ids",
            libc::PR_SET_SECUREBITS,
            (now.securebits | SECBIT_NO_SETUID_FIXUP) as u64,
        );
        self.restore_ids(batch);
        capset(
            batch,
            "set the inheritable capabilities",
            now.capabilities.permitted,
            now.capabilities.permitted,
            c.inheritable,
        );
        for n in bits(now.capabilities.bounding & !c.bounding) {
            prctl(
                batch,
                "drop a capability from the bounding set",
                libc::PR_CAPBSET_DROP,
                n as u64,
            );
        }
        batch.call(
            "clear the ambient capabilities",
            libc::SYS_prctl,
            &[
                libc::PR_CAP_AMBIENT.into(),
                libc::PR_CAP_AMBIENT_CLEAR_ALL.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        );
        for n in bits(c.ambient) {
            batch.call(
                "raise an ambient capability",
                libc::SYS_prctl,
                &[
                    libc::PR_CAP_AMBIENT.into(),
                    libc::PR_CAP_AMBIENT_RAISE.into(),
                    n.into(),
                    0u64.into(),
                    0u64.into(),
                ],
            );
        }
        prctl(
            batch,
            "set the securebits",
            libc::PR_SET_SECUREBITS,
            self.securebits as u64,
        );
        capset(
            batch,
            "set the capabilities",
            c.effective,
            c.permitted,
            c.inheritable,
        );
        self.restore_no_new_privs(batch, now);
        Ok(())
    }

    fn same_identity(&self, now: &Credentials) -> bool {
        (self.uid, self.gid, self.capabilities) == (now.uid, now.gid, now.capabilities)
            && self.groups == now.groups
    }

    fn restore_ids(&self, batch: &mut Batch) {
        let mut list: Vec<u8> = self.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
        list.resize(list.len().max(8), 0);
        let list = batch.data(&list);
        batch.call(
            "set the supplementary groups",
            libc::SYS_setgroups,
            &[self.groups.len().into(), list.into()],
        );
        for (ids, what, number, what_fs, number_fs) in [
            (
                self.gid,
                "set the group ids",
                libc::SYS_setresgid,
                "set the file system group id",
                libc::SYS_setfsgid,
            ),
            (
                self.uid,
                "set the user ids",
                libc::SYS_setresuid,
                "set the file system user id",
                libc::SYS_setfsuid,
            ),
        ] {
            batch.call(
                what,
                number,
                &[ids.real.into(), ids.effective.into(), ids.saved.into()],
            );
            if ids.fs != ids.effective {
                // It answers with the old id, never with an error.
                batch.may_fail(what_fs, number_fs, &[ids.fs.into()]);
            }
        }
    }

    fn restore_no_new_privs(&self, batch: &mut Batch, now: &Credentials) {
        if self.no_new_privs && !now.no_new_privs {
            batch.call(
                "set no-new-privs",
                libc::SYS_prctl,
                &[
                    libc::PR_SET_NO_NEW_PRIVS.into(),
                    1u64.into(),
                    0u64.into(),
                    0u64.into(),
                    0u64.into(),
                ],
            );
        }
    }
}

fn prctl(batch: &mut Batch, what: &'static str, option: i32, value: u64) {
    batch.call(
        what,
        libc::SYS_prctl,
        &[
            option.into(),
            value.into(),
            0u64.into(),
            0u64.into(),
            0u64.into(),
        ],
    );
}

fn capset(batch: &mut Batch, what: &'static str, effective: u64, permitted: u64, inherit: u64) {
    // struct __user_cap_header_struct: version, pid (0: the caller).
    let header = batch.data(&bytes_of(&[CAPABILITY_VERSION_3]));
    // Two of struct __user_cap_data_struct: the low words, then the high ones.
    let mut data = Vec::with_capacity(24);
    for shift in [0, 32] {
        for set in [effective, permitted, inherit] {
            data.extend_from_slice(&((set >> shift) as u32).to_le_bytes());
        }
    }
    let data = batch.data(&data);
    batch.call(what, libc::SYS_capset, &[header.into(), data.into()]);
}

fn bits(set: u64) -> impl Iterator<Item = u32> {
    (0..64).filter(move |n| set >> n & 1 == 1)
}

/// Capabilities by number (`<linux/capability.h>`).
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The names of a set of capabilities.
pub fn capability_names(set: u64) -> String {
    bits(set)
        .map(|n| match CAPABILITIES.get(n as usize) {
            Some(name) => format!("cap_{name}"),
            None => format!("cap_{n}"),
        })
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Credentials {
        Credentials {
            capabilities: Capabilities {
                permitted: (1 << 41) - 1,
                effective: (1 << 41) - 1,
                inheritable: 0,
                ambient: 0,
                bounding: (1 << 41) - 1,
            },
            ..Credentials::default()
        }
    }

    #[test]
    fn reads_its_own() {
        let s = Status::read(std::process::id() as i32).unwrap();
        let c = Credentials::from_status(&s);
        c.check().unwrap();
        assert_eq!(c.uid.effective, nix::unistd::geteuid().as_raw());
    }

    #[test]
    fn what_root_lacks_is_named() {
        let mut have = root();
        have.capabilities.permitted &= !(1 << 24);
        let o = root().obstacles(&have);
        assert_eq!(o.len(), 1);
        assert!(o[0].why.contains("cap_sys_resource"), "{}", o[0]);
        assert!(have.obstacles(&root()).is_empty());
        have.no_new_privs = true;
        have.securebits = 0b11;
        assert_eq!(root().obstacles(&have).len(), 3);
    }

    #[test]
    fn impossible_sets_are_refused() {
        let mut b = Batch::new();
        let mut c = root();
        c.capabilities.ambient = 1;
        assert!(c.restore(&mut b, &root()).is_err());
        let mut c = root();
        c.capabilities.permitted = 0;
        assert!(c.restore(&mut b, &root()).is_err());
        assert!(b.is_empty());
    }

    #[test]
    fn unchanged_credentials_cost_nothing() {
        let mut b = Batch::new();
        root().restore(&mut b, &root()).unwrap();
        assert!(b.is_empty());
        let mut user = root();
        user.uid.real = 1000;
        user.restore(&mut b, &root()).unwrap();
        assert!(!b.is_empty());
    }
}
