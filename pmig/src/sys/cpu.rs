//! What the processor says of itself.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// One component of the extended state in the standard XSAVE format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Bit in XCR0: 2 is AVX, 5 to 7 AVX-512, 9 PKRU, 17 and 18 AMX.
    pub index: u32,
    /// Bytes from the start of the area.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

/// How the processor lays out extended state (CPUID leaf 0xD, Intel SDM
/// vol. 1, 13.2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XstateLayout {
    /// Components the operating system enabled.
    pub xcr0: u64,
    /// Bytes of an area that holds all of them.
    pub size: u32,
    /// Those beyond x87 and SSE, which lie in the fixed first 576 bytes.
    pub components: Vec<Component>,
}

/// The layout of this machine; it does not change while the machine runs.
pub fn xstate_layout() -> &'static XstateLayout {
    static LAYOUT: OnceLock<XstateLayout> = OnceLock::new();
    LAYOUT.get_or_init(read_layout)
}

#[allow(unused_unsafe)] // newer compilers take cpuid for safe
fn read_layout() -> XstateLayout {
    const OSXSAVE: u32 = 1 << 27;
    // SAFETY: every x86-64 processor has CPUID.
    let (max, one) = unsafe { (__cpuid(0).eax, __cpuid(1).ecx) };
    if max < 0xd || one & OSXSAVE == 0 {
        return XstateLayout {
            xcr0: 3,
            size: 576,
            components: Vec::new(),
        };
    }
    // SAFETY: OSXSAVE says that the system has enabled xgetbv.
    let xcr0 = unsafe { xcr0() };
    let components = (2..63)
        .filter(|i| xcr0 >> i & 1 == 1)
        .map(|index| {
            // SAFETY: as above; the leaf exists.
            let leaf = unsafe { __cpuid_count(0xd, index) };
            Component {
                index,
                offset: leaf.ebx,
                size: leaf.eax,
            }
        })
        .collect();
    XstateLayout {
        xcr0,
        // SAFETY: as above.
        size: unsafe { __cpuid_count(0xd, 0) }.ebx,
        components,
    }
}

#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller made sure that the instruction is there.
    unsafe { _xgetbv(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_lie_within_the_area() {
        let l = xstate_layout();
        assert_eq!(l.xcr0 & 3, 3);
        for c in &l.components {
            assert!(c.offset >= 576 && c.offset + c.size <= l.size, "{c:?}");
        }
    }
}
