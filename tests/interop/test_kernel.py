"""Linux as client: Debian's kernel in a virtual machine, its disks from our server."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nbdvde import KeyFile, check_image
from tests.interop.cluster import Cluster
from tests.interop.conftest import SIZE, Serve
from tests.interop.guest import Guest, booted
from tests.interop.harness import NBDVDE, ROOT, Process, Served, need, run, serve_image
from tests.interop.initramfs import add_python, make_initramfs, make_root

pytestmark = [pytest.mark.boots, pytest.mark.timeout(600)]
HOST = "10.0.2.2"
"""This machine, as the guest sees it."""
NETWORK = ("-nic", "user,model=virtio-net-pci")
ATTACHMENTS = {"one": "", "persist": "-persist", "ioctl": "-nonetlink -persist", "four": "-C 4"}
TREE_KIB = 4096


class Attached:
    """A guest, and an encrypted image that it attaches over TCP."""

    def __init__(self, served: Served, folder: Path) -> None:
        self._served, self._folder = served, folder
        served.server.stop()
        self.image = served.image
        self.port = "0"
        self.start()
        self.guest: Guest

    def start(self) -> None:
        """Serve the image over TCP."""
        assert self.image
        what: list[str | Path] = [self.image, "--key-file", self._served.key_file]
        self.server = Process(self._folder, what, listen=f"127.0.0.1:{self.port}")
        self.port = self.server.uri.strip("/").rsplit(":", 1)[1]

    def attach(self, options: str = "", disk: str = "disk") -> None:
        """The disk becomes /dev/nbd0."""
        self.guest.run(f"nbd-client -N {disk} -b 4096 {options} {HOST} {self.port} /dev/nbd0")
        self.guest.wait_for("nbd-client -c /dev/nbd0")

    def detach(self) -> None:
        """/dev/nbd0 is free again."""
        self.guest.run("nbd-client -d /dev/nbd0")
        self.guest.wait_for("! nbd-client -c /dev/nbd0")


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("nbd-client", "mke2fs", "e2fsck", "resize2fs")
    root = make_root(tmp_path_factory.mktemp("guest") / "root")
    add_python(root, ROOT / "tools" / "nbd_keep.py")
    return make_initramfs(root)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, initramfs: Path) -> Iterator[Attached]:
    """One boot for all tests; each leaves /dev/nbd0 free."""
    folder = tmp_path_factory.mktemp("attached")
    attached = Attached(serve_image(folder, SIZE), folder)
    try:
        with booted("-initrd", initramfs, *NETWORK) as attached.guest:
            yield attached
        attached.server.stop()
    finally:
        attached.server.kill()
    assert attached.image
    report = check_image(attached.image, key=KeyFile((folder / "key").read_bytes()))
    assert report.ok, report


def write_tree(guest: Guest, folder: str) -> None:
    """Files of several sizes and their checksums."""
    guest.run(
        f"mkdir {folder} && cd {folder} && for n in 1 2 3 4; do mkdir $n && "
        f"dd if=/dev/urandom of=$n/large bs=64k count={TREE_KIB // 256} 2> /dev/null && "
        f"for m in 1 2 3 4 5; do echo $n $m > $n/small$m; done; done && "
        f"find . -type f ! -name sums -exec sha256sum {{}} + > sums && cd /"
    )


@pytest.mark.parametrize("options", ATTACHMENTS.values(), ids=ATTACHMENTS)
def test_file_system(machine: Attached, options: str) -> None:
    """ext4 made, filled, taken off, attached once more and found whole."""
    guest = machine.guest
    machine.attach(options)
    assert guest.run("cat /sys/block/nbd0/size").strip() == str(SIZE // 512)
    assert guest.run("cat /sys/block/nbd0/queue/logical_block_size").strip() == "4096"
    guest.run("/sbin/mke2fs -F -q -t ext4 /dev/nbd0 && mount /dev/nbd0 /mnt")
    write_tree(guest, "/mnt/tree")
    guest.run("cp -a /mnt/tree /mnt/copy && umount /mnt")
    machine.detach()
    machine.attach(options)
    guest.run("/sbin/e2fsck -fn /dev/nbd0 && mount -o ro /dev/nbd0 /mnt")
    guest.run("for tree in tree copy; do cd /mnt/$tree && sha256sum -c -s sums || break; done && cd / && umount /mnt")
    machine.detach()


@pytest.mark.parametrize("connections", [1, 4])
def test_restart_in_a_copy(machine: Attached, connections: int) -> None:
    """The copy goes on when the server is back, and nothing noticed an error."""
    guest = machine.guest
    machine.attach(f"-persist -timeout 5 -C {connections}")
    guest.run("dmesg -n 1; dmesg -c > /dev/null; rm -f /tmp/*")
    guest.run(f"nbd_keep.py /dev/nbd0 {HOST} {machine.port} disk > /tmp/keep 2>&1 & echo $! > /tmp/keeper")
    guest.wait_for("grep -q keeping /tmp/keep")
    guest.run("/sbin/mke2fs -F -q -t ext4 /dev/nbd0 && mount /dev/nbd0 /mnt")
    write_tree(guest, "/mnt/tree")
    guest.run(
        "(until [ -e /tmp/enough ]; do rm -rf /mnt/copy && cp -a /mnt/tree /mnt/copy && sync || touch /tmp/failed; "
        "touch /tmp/$((copies += 1)).copied; done; touch /tmp/ended) > /tmp/log 2>&1 &"
    )
    guest.wait_for("[ -e /tmp/1.copied ]")
    machine.server.stop()
    machine.start()
    guest.wait_for(f"[ $(grep -c again /tmp/keep) = {connections} ]")
    guest.run("touch /tmp/enough")
    guest.wait_for("[ -e /tmp/ended ]")
    assert not guest.run("cat /tmp/log; ls /tmp | grep failed; dmesg | grep -i 'i/o error'; true")
    guest.run("kill $(cat /tmp/keeper); umount /mnt")
    machine.detach()
    machine.attach()
    guest.run("/sbin/e2fsck -fn /dev/nbd0 && mount -o ro /dev/nbd0 /mnt")
    guest.run("for tree in tree copy; do cd /mnt/$tree && sha256sum -c -s sums || break; done && cd / && umount /mnt")
    machine.detach()


def test_swap(machine: Attached) -> None:
    """What a group of processes writes beyond its memory goes to the disk, and is read again.

    The group is short of memory, not the machine: a kernel without a byte left may not get a packet out
    (docs/how-to/attach-with-the-kernel.md), whoever serves.
    """
    guest, image = machine.guest, machine.image
    assert image
    run(NBDVDE, "disk", "create", image, "swap", "64M")
    machine.attach("-swap", disk="swap")
    guest.run("mkswap /dev/nbd0 && swapon /dev/nbd0 && mount -t tmpfs -o size=32m none /mnt")
    guest.run("mount -t cgroup2 none /sys/fs/cgroup && echo +memory > /sys/fs/cgroup/cgroup.subtree_control")
    guest.run("mkdir /sys/fs/cgroup/small && echo 8M > /sys/fs/cgroup/small/memory.max")
    write = "dd if=/dev/urandom of=/mnt/file bs=1M count=20 2> /dev/null"
    guest.run(f"(echo 0 > /sys/fs/cgroup/small/cgroup.procs && {write}) && sha256sum /mnt/file > /tmp/sum")
    used_kib = int(guest.run("awk '/nbd0/ {print $4}' /proc/swaps"))
    assert used_kib > 8 << 10
    guest.run("sha256sum -c -s /tmp/sum && umount /mnt && swapoff /dev/nbd0 && umount /sys/fs/cgroup")
    machine.detach()
    run(NBDVDE, "disk", "delete", image, "swap", "--force")


def test_a_disk_that_grows(machine: Attached) -> None:
    """The step that docs/how-to/resize.md tells: off, on again, and the file system grows."""
    guest, image = machine.guest, machine.image
    assert image
    run(NBDVDE, "disk", "create", image, "growing", "32M")
    machine.attach(disk="growing")
    guest.run("/sbin/mke2fs -F -q -t ext4 /dev/nbd0 && mount /dev/nbd0 /mnt")
    write_tree(guest, "/mnt/tree")
    guest.run("umount /mnt")
    run(NBDVDE, "disk", "resize", image, "growing", "64M")
    assert guest.run("cat /sys/block/nbd0/size").strip() == str((32 << 20) // 512)
    machine.detach()
    machine.attach(disk="growing")
    assert guest.run("cat /sys/block/nbd0/size").strip() == str((64 << 20) // 512)
    guest.run("/sbin/e2fsck -fp /dev/nbd0 && /sbin/resize2fs /dev/nbd0 && mount /dev/nbd0 /mnt")
    assert int(guest.run("df -k /mnt | awk 'END {print $2}'")) > 48 << 10
    guest.run("cd /mnt/tree && sha256sum -c -s sums && cd / && umount /mnt")
    machine.detach()
    run(NBDVDE, "disk", "delete", image, "growing", "--force")


def test_the_leader_of_a_cluster_changes(machine: Attached, tmp_path: Path) -> None:
    """The kernel notices nothing but a pause: no error, and no other connection."""
    guest = machine.guest
    with closing(Cluster(tmp_path, 32 << 20)) as cluster:
        first = cluster.members[0]
        first.stop()
        cluster.leader()
        first.start("127.0.0.1:0")
        port = first.uri.strip("/").rsplit(":", 1)[1]
        guest.run(f"dmesg -c > /dev/null; nbd-client -N disk -b 4096 {HOST} {port} /dev/nbd0")
        guest.wait_for("nbd-client -c /dev/nbd0")
        guest.run("/sbin/mke2fs -F -q -t ext4 /dev/nbd0 && mount /dev/nbd0 /mnt && rm -f /tmp/*")
        guest.run(
            "(until [ -e /tmp/enough ]; do dd if=/dev/urandom of=/mnt/file bs=4k count=50 conv=fsync 2> /dev/null "
            "|| touch /tmp/failed; touch /tmp/$((rounds += 1)).done; done; touch /tmp/ended) > /tmp/log 2>&1 &"
        )
        guest.wait_for("[ -e /tmp/1.done ]")
        for _ in range(3):
            before = cluster.leader()
            run(NBDVDE, "cluster", "transfer", before.image)
            assert cluster.leader() is not before
        guest.run("touch /tmp/enough")
        guest.wait_for("[ -e /tmp/ended ]")
        signs = "dmesg | grep -i -e error -e fail -e shut -e 'timed out'"
        assert not guest.run(f"cat /tmp/log; ls /tmp | grep failed; {signs}; true")
        guest.run("umount /mnt")
        machine.detach()
        for member in cluster.members:
            member.stop()


def test_list(machine: Attached) -> None:
    assert machine.guest.run(f"nbd-client -l {HOST} {machine.port}").split() == ["Negotiation:", "..", "disk"]


def test_root_disk_of_qemu(serve: Serve, tmp_path: Path) -> None:
    """A guest that has its root on our export boots, writes, and shuts down clean."""
    need("mke2fs", "e2fsck", "qemu-img")
    served, disk, after = serve(SIZE), tmp_path / "disk.raw", tmp_path / "after.raw"
    root = make_root(tmp_path / "root")
    run("mke2fs", "-q", "-t", "ext4", "-d", root, disk, f"{SIZE >> 10}k")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, served.uri)
    switch = "mount -t ext4 /dev/vda /mnt && exec switch_root /mnt /init"
    first = make_initramfs(make_root(tmp_path / "first", then=f"[ -e /mnt/init ] || {{ {switch}; }}"))
    with booted("-initrd", first, "-nic", "none", "-drive", f"file={served.uri},if=virtio,format=raw") as guest:
        assert " / ext4 rw" in guest.run("cat /proc/mounts")
        write_tree(guest, "/tree")
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, after)
    run("e2fsck", "-fn", after)
    assert "sums" in run("debugfs", "-R", "ls /tree", after)
