"""The inner half of common/sandbox.py: builds the walls around one command, runs it and ends what it leaves.

    python -I -S -B jail.py STATUS_FD < spec.json        # only common/sandbox.py calls this

Standard library only, and nothing of the project: this runs before anybody is trusted. It tries the walls
from the strongest to the weakest: namespaces made as root, namespaces made as a user, none. Each attempt is a
process of its own, so that a failed one leaves nothing behind. Lines of JSON on STATUS_FD tell which walls
stand ({"walls": {...}}) and how the command ended ({"status": N, "why": ...}).
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
# flags of unshare(2): mount, uts, ipc, user, process and network namespaces
NEWNS, NEWUTS, NEWIPC = 0x20000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
SPACES = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
# mount(2) and mount_setattr(2); the three system calls have the same number on every architecture
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_IDMAP = 1, 2, 4, 0x100000
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
DEVICES = ("null", "zero", "full", "random", "urandom")
POLL_S = 0.05
PROCESSES = 256  # processes and threads of the command


class NoWalls(Exception):
    """This kind of wall cannot be built here; the message says why."""


def check(code: int, what: str) -> int:
    """The result of a C function; NoWalls with the system's reason where it failed."""
    if code < 0:
        raise NoWalls(f"{what}: {os.strerror(ctypes.get_errno())}")
    return code


def put(path: str, text: str) -> None:
    """Write a kernel file."""
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


# ----- the view of the files --------------------------------------------------------------------------------

def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    words = (x.encode() for x in (source, target, kind))
    check(LIBC.mount(*words, flags, data.encode()), f"mount {target}")


def bind(source: str, target: str, attributes: int, ids: int | None = None) -> None:
    """Show `source` at `target`, which is made, with attributes of mount_setattr(2).

    ids: file descriptor of a user namespace; the files then belong to the command's user in this view alone.
    """
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            with open(target, "xb"):
                pass
    flags = 1 | AT_RECURSIVE | os.O_CLOEXEC  # 1: OPEN_TREE_CLONE
    tree = check(LIBC.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(source), flags), f"open_tree {source}")
    try:
        if ids is not None:
            attributes |= ATTR_IDMAP
        words = struct.pack("QQQQ", attributes, 0, 0, 0 if ids is None else ids)
        check(LIBC.syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, words, len(words)),
              f"mount_setattr {source}")
        check(LIBC.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), 4), f"move_mount {target}")
    finally:
        os.close(tree)


def id_namespace(owner: int, user: int) -> int:
    """File descriptor of a user namespace in which files of `owner` belong to `user`."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        LIBC.unshare(NEWUSER)
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        put(f"/proc/{child}/uid_map", f"{owner} {user} 1")
        put(f"/proc/{child}/gid_map", f"{owner} {user} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)


def show(path: str, root: str, writable: bool, user: int | None, ids: dict[int, int]) -> None:
    """Bind one path of the caller's into the new root, as files of the command's user where that is another.

    ids: file descriptor of a user namespace by owner.
    """
    attributes = ATTR_NOSUID | ATTR_NODEV | (0 if writable else ATTR_RDONLY)
    owner = os.stat(path).st_uid
    if user is not None and owner != user:
        with contextlib.suppress(NoWalls, OSError):  # a file system without mapped mounts
            return bind(path, root + path, attributes, ids[owner])
        if writable:
            give(path, user)
    return bind(path, root + path, attributes)


def give(path: str, user: int) -> None:
    """Make a folder and what it holds the command's user's, following nothing."""
    os.chown(path, user, user, follow_symlinks=False)
    for folder, folders, names in os.walk(path):
        for name in folders + names:
            os.chown(os.path.join(folder, name), user, user, follow_symlinks=False)


def build_root(spec: dict, user: int | None, ids: dict[int, int]) -> None:
    """A new root that shows the system and the listed paths, read-only but for `writable`; then go there."""
    root = spec["root"]
    check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "make / private")
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m")
    for path in spec["system"]:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            bind(path, root + path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    build_devices(root, spec["memory_mib"])
    os.makedirs(root + "/proc")
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV)
    for name in ("sys", "sysrq-trigger", "irq", "bus"):
        if os.path.exists(f"{root}/proc/{name}"):
            bind(f"{root}/proc/{name}", f"{root}/proc/{name}", ATTR_RDONLY)
    listed = [(path, False) for path in spec["readable"]] + [(path, True) for path in spec["writable"]]
    for path, writable in sorted(listed, key=lambda x: (x[0].count("/"), x[1])):
        show(path, root, writable, user, ids)
    os.chdir(root)
    check(LIBC.pivot_root(b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", 2), "leave the old root")  # 2: MNT_DETACH
    os.chdir("/")
    root_fd = os.open("/", os.O_PATH)
    words = struct.pack("QQQQ", ATTR_RDONLY, 0, 0, 0)
    check(LIBC.syscall(MOUNT_SETATTR, root_fd, b"", AT_EMPTY_PATH, words, len(words)), "make / read-only")
    os.close(root_fd)


def build_devices(root: str, memory_mib: int) -> None:
    """The harmless devices, those of NVIDIA where there are any, and memory for /tmp and /dev/shm."""
    os.makedirs(root + "/dev")
    nvidia = [name for name in os.listdir("/dev") if name.startswith("nvidia")]
    for name in (*DEVICES, *nvidia):
        if os.path.exists(f"/dev/{name}"):
            bind(f"/dev/{name}", f"{root}/dev/{name}", ATTR_NOSUID)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                         ("stderr", "/proc/self/fd/2")):
        os.symlink(target, f"{root}/dev/{name}")
    for folder in ("/dev/shm", "/tmp"):
        os.makedirs(root + folder)
        mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={memory_mib // 2 + 1}m")


# ----- rights and limits ------------------------------------------------------------------------------------

def drop_rights(user: int | None) -> None:
    """No capability, none to be gained, and another user where this one is root."""
    for capability in range(64):
        if LIBC.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP; EINVAL after the last one
            break
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # capset(2): version 3, this process, two empty sets
    LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    LIBC.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
    check(LIBC.prctl(38, 1, 0, 0, 0), "no new privileges")


def limit(spec: dict) -> None:
    """Limits of one process. RLIMIT_DATA, because an address space holds torch's and CUDA's reservations,
    too."""
    mib = 2 ** 20
    cores = os.cpu_count() or 1
    for what, value in (
        (resource.RLIMIT_DATA, spec["memory_mib"] * mib), (resource.RLIMIT_FSIZE, spec["file_mib"] * mib),
        (resource.RLIMIT_CPU, int(spec["seconds"] * cores) + 5), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 1024), (getattr(resource, "RLIMIT_NPROC", None), PROCESSES),
    ):
        if what is None or what == resource.RLIMIT_NPROC and os.getuid() == 0:
            continue
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))


def landlock(writable: list[str]) -> bool:
    """Landlock (Linux 5.13): this process and its children write below these folders only. Returns whether
    it holds."""
    with contextlib.suppress(AttributeError, OSError):
        version = LIBC.syscall(444, None, 0, 1)
        if sys.platform != "linux" or version < 1:
            return False
        # write file, remove and make of every kind; from version 2 also link and rename, from 3 truncate
        rights = 1 << 1 | sum(1 << i for i in range(4, 13)) | (version > 1) << 13 | (version > 2) << 14
        words = struct.pack("Q", rights)
        ruleset = LIBC.syscall(444, words, len(words), 0)
        for path in (*writable, "/dev/null"):
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) else rights & (1 << 1 | 1 << 14)
            if LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, handle), 0):
                return False
            os.close(handle)
        LIBC.prctl(38, 1, 0, 0, 0)
        return not LIBC.syscall(446, ruleset, 0)
    return False


# ----- one attempt ------------------------------------------------------------------------------------------

def enter_namespaces(spec: dict, user: int | None) -> dict[int, int]:
    """Leave the caller's namespaces; the next child is process 1 of the new ones.

    Returns {owner: file descriptor of a user namespace} for the owners of the listed paths.
    """
    if user is not None:
        owners = {os.stat(path).st_uid for path in spec["readable"] + spec["writable"]}
        ids = {owner: id_namespace(owner, user) for owner in owners - {user}}
        check(LIBC.unshare(SPACES), "unshare")
        return ids
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(SPACES | NEWUSER), "unshare")
    put("/proc/self/setgroups", "deny")
    put("/proc/self/uid_map", f"{uid} {uid} 1")
    put("/proc/self/gid_map", f"{gid} {gid} 1")
    return {}


def raise_loopback() -> None:
    """Let the command's processes talk to each other: the network's only interface is its own."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def walled(spec: dict, kind: str, user: int | None, ids: dict[int, int]) -> dict[str, str]:
    """Build the walls of a kind in this process. Returns {wall: what holds, or ""}."""
    walls = {"kind": kind, "network": "", "view": "", "writes": "", "processes": ""}
    if kind == "namespaces":
        build_root(spec, user, ids)
        LIBC.sethostname(b"sandbox", 7)
        raise_loopback()
    if kind in ("namespaces", "bubblewrap"):  # bwrap built them around this process
        walls |= {"network": "none", "view": "the system and the listed paths only",
                  "writes": "the listed folders only", "processes": "its own alone"}
    else:
        spec["writable"].append(spec["root"])
        for name in ("HOME", "TMPDIR"):
            spec["env"][name] = spec["root"] if spec["env"][name] == "/tmp" else spec["env"][name]
        user = user if user is not None and can_start(spec, user) else None
        for path in spec["writable"] if user is not None else ():
            give(path, user)
        if landlock(spec["writable"]):
            walls["writes"] = "the listed folders only"
    with contextlib.suppress(NoWalls) if kind == "plain" else contextlib.nullcontext():
        drop_rights(user)
    walls["user"] = "" if os.getuid() == 0 else f"user {os.getuid()}, no rights to gain"
    grouped = any(os.path.exists(folder + "/memory.stat") for folder in spec["cgroup"])
    walls["memory"] = "watched, a control group behind it" if grouped else "watched"
    return walls


def can_start(spec: dict, user: int) -> bool:
    """Whether that user could start the command here, where the view of the files is everybody's."""
    child = os.fork()
    if not child:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os._exit(0 if os.access(spec["command"][0], os.X_OK) and os.access(spec["cwd"], os.X_OK) else 1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def attempt(spec: dict, kind: str, user: int | None, say: Callable[[str], None]) -> None:
    """Run the command behind walls of one kind. Raises NoWalls, before it has started, if they cannot be
    built."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        tied()
        try:
            ids = {}
            if kind == "namespaces":
                ids = enter_namespaces(spec, user)
                inner = os.fork()
                if inner:
                    os.close(tell)
                    os._exit(0 if os.waitpid(inner, 0)[1] == 0 else 1)
                tied()
            keep(spec, kind, user, ids, tell)
        except BaseException as error:
            os.write(tell, f"no {error or type(error).__name__}\n".encode("utf-8", "replace")[:400])
            os._exit(1)
    os.close(tell)
    with os.fdopen(told, encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
        if first.startswith("{"):
            say(first)
        for line in lines:
            say(line)
    os.waitpid(child, 0)
    if not first.startswith("{"):
        raise NoWalls(first[3:].strip() or "the process ended")


def tied() -> None:
    """This process ends with its parent."""
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def keep(spec: dict, kind: str, user: int | None, ids: dict[int, int], tell: int) -> NoReturn:
    """The keeper: build the walls, start the command, watch time and memory, end all that is left."""
    LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: whoever is orphaned becomes a child of this process
    walls = walled(spec, kind, user, ids)
    if kind != "namespaces" or user is not None:
        tied()  # a change of user forgets it
    LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the command cannot look into this process
    os.write(tell, (json.dumps({"walls": walls}) + "\n").encode())
    child = os.fork()
    if not child:
        start(spec, tell)
    why, status = watch(spec, child)
    end_all()
    os.write(tell, (json.dumps({"status": status, "why": why}) + "\n").encode())
    os._exit(0)


def start(spec: dict, tell: int) -> NoReturn:
    """Become the command."""
    try:
        os.setsid()
        limit(spec)
        for name in ("SIGPIPE", "SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        LIBC.prctl(4, 1, 0, 0, 0)  # its own /proc entries are its own again
        os.chdir(spec["cwd"])
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.execve(spec["command"][0], spec["command"], spec["env"])
    except BaseException as error:
        os.write(2, f"cannot start {spec['command'][0]}: {error}\n".encode("utf-8", "replace"))
    os._exit(127)


def watch(spec: dict, child: int) -> tuple[str, int]:
    """Wait for the command. Returns (why it was ended: "", "time" or "memory", its wait status)."""
    deadline, bound = time.monotonic() + spec["seconds"], spec["memory_mib"] * 1024
    status = None
    while status is None:
        pid, found = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            status = found
        elif pid:
            continue
        elif time.monotonic() > deadline:
            return "time", end(child)
        elif held_kib() > bound:
            return "memory", end(child)
        else:
            time.sleep(POLL_S)
    return "", status


def end(child: int) -> int:
    """Kill the command. Returns its wait status."""
    os.kill(child, signal.SIGSTOP)  # first, or it could act on the end of its children
    end_all(spare=child)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def descendants() -> list[int]:
    """Process ids of all that descends from this process."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found, layer = [], [os.getpid()]
    while layer:
        layer = [pid for pid, parent in parents.items() if parent in layer and pid not in found]
        found += layer
    return found


def held_kib() -> int:
    """KiB of memory that the descendants hold: private, and shared memory that no file backs."""
    total = 0
    for pid in descendants():
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"RssAnon:", b"RssShmem:")):
                    total += int(line.split()[1])
    return total


def end_all(spare: int | None = None) -> None:
    """Kill and reap every descendant but one; those that are born meanwhile, too."""
    for _ in range(200):
        alive = [pid for pid in descendants() if pid != spare]
        if not alive:
            return
        # stopped before any is killed, so that none can start another at the death of its neighbour
        for pid, how in [(pid, how) for how in (signal.SIGSTOP, signal.SIGKILL) for pid in alive]:
            with contextlib.suppress(OSError):
                os.kill(pid, how)
        for pid in alive:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def main(status: int) -> None:
    """Try each kind of walls that the spec names."""
    tied()
    spec = json.load(sys.stdin)
    os.set_inheritable(status, False)
    if spec["cgroup"]:
        for folder in spec["cgroup"]:
            put(folder + "/cgroup.procs", str(os.getpid()))
    user = spec["user"] if os.getuid() == 0 else None
    refused = []

    def say(line):
        fields = json.loads(line)
        if "walls" in fields:
            fields["walls"]["refused"] = refused
        os.write(status, (json.dumps(fields) + "\n").encode())

    for kind in spec["kinds"]:
        try:
            return attempt(spec, kind, user, say)
        except NoWalls as error:
            refused.append(f"{kind}: {error}")
    os.write(status, (json.dumps({"failed": "; ".join(refused)}) + "\n").encode())
    return None


if __name__ == "__main__":
    main(int(sys.argv[1]))
