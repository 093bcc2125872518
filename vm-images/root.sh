#!/bin/sh
# Run by mmdebstrap with the new root as its argument: unpacks the kernel
# without installing it, so that no initrd is made that nobody boots.
set -eu
chroot "$1" sh -eu <<'EOF'
cd /tmp
image=$(apt-cache depends linux-image-cloud-amd64 |
    sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
apt-get -o APT::Sandbox::User=root download "$image"
dpkg-deb -x linux-image-*.deb kernel
release=$(ls kernel/usr/lib/modules)
mkdir -p /usr/lib/modules
mv "kernel/usr/lib/modules/$release" /usr/lib/modules/
mv "kernel/boot/vmlinuz-$release" /boot/vmlinuz
echo "$release" > /boot/release
depmod "$release"
rm -rf kernel linux-image-*.deb
EOF
rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*
