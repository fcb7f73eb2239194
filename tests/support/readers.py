"""Every reader of bytes that a container, an image or an unprivileged user can influence.

Each has to refuse what it cannot use with one of the exceptions that are named here, in bounded time.
tests/unit/test_foreign_bytes.py feeds them for some seconds; a fuzzer can take the same list and feed them for longer.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from graft.errors import GraftError
from graft.kernel import cgroup, inotify, sockdiag, tasks
from graft.kernel.btf import Btf
from graft.kernel.seccomp import Notification
from graft.model.endpoint import parse_egress_flag, parse_endpoint, parse_ingress_flag
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.model.sockaddr import parse_sockaddr
from graft.oci import arguments, bundle, features, options, profile_text, request, state
from graft.oci.bundle import Edit
from graft.oci.options import RuntimeOptions
from graft.policy.compiler import compile_policy
from graft.policy.document import read_document
from graft.policy.files import decode_policy
from graft.policy.reader import load_policy
from graft.saved import envelope
from graft.saved.text import import_text
from graft.saved.values import plain_document, read_endpoint_file
from graft.splice import control, selftest_result
from graft.state import records
from graft.state.engines import parse_inspect, parse_show
from graft.swap import descriptors, unix_bind
from tests.support.btf import Blob

ID = "0123456789abcdef" * 4
KNOWN = {
    "nx4": parse_endpoint("nx4", "0.0.0.0:8080", open_=True),
    "nx6": parse_endpoint("nx6", "[::]:8080", open_=True),
    "shut": parse_endpoint("shut", "0.0.0.0:8081"),
}
_NOWHERE = Settings.from_environment({"GRAFT_STATE_DIR": "/nonexistent/graft"})
_EDIT = Edit(
    create_runtime=("/bin/true",),
    poststop=("/bin/true",),
    listener="/run/graft/oci/a/seccomp",
    own_listeners="/run/graft/oci",
)


class Reader(NamedTuple):
    """``read`` takes any bytes, and raises nothing but ``allowed``.

    ``seeds`` are bytes that it accepts: changed seeds get farther in it than random bytes.
    """

    name: str
    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...] = ()
    seeds: tuple[bytes, ...] = ()


def text_of(raw: bytes) -> str:
    """Bytes as Python decodes file names and arguments: those that are not UTF-8 become surrogates."""
    return raw.decode(errors="surrogateescape")


def _replaced(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _pairs(raw: bytes) -> None:
    policy = request.policy_from_pairs(text_of(raw), KNOWN)
    compile_policy(policy, KNOWN)


def _config(raw: bytes) -> None:
    """All that is done with an engine's configuration before a runtime gets it."""
    config = bundle.parse_config(raw, "config.json")
    asked = request.requested(config)
    request.check_capabilities(config, RuntimeOptions(), own_user_namespace=False)
    request.check_annotations(config, RuntimeOptions(), notified=True)
    for kind in ("network", "user"):
        bundle.namespace_path(config, kind)
    json.dumps(bundle.edit_config(config, _EDIT))
    if asked is not None and asked.source is request.Source.PAIRS:
        _pairs(asked.value.encode(errors="surrogateescape"))
    elif asked is not None:
        request.find_policy(_NOWHERE, asked.source, asked.value, trusted=True)


def _profile(raw: bytes) -> None:
    profile_text.profile_text(profile_text.parse_base(raw, "--base"), Path("/run/graft/listener"))


def _sockets(raw: bytes) -> None:
    for kind, message in sockdiag.split_messages(raw):
        if kind == 20:  # SOCK_DIAG_BY_FAMILY
            sockdiag.parse_listener(message)


def _btf(raw: bytes) -> None:
    btf = Btf(raw)
    for member in ("first", "deep", "low", "nothing"):
        btf.offset("thing", member)


def _shown(raw: bytes) -> None:
    shown = printable(text_of(raw))
    assert shown.isprintable() and shown.encode().decode() == shown


def _dump(value: object) -> bytes:
    return json.dumps(value).encode()


_SECCOMP = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "architectures": ["SCMP_ARCH_X86_64"],
    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "syscalls": [
        {
            "names": ["read", "connect"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
        },
        {"name": "bind", "action": "SCMP_ACT_LOG", "includes": {"caps": ["CAP_NET_ADMIN"]}},
    ],
}
_CONFIG = {
    "ociVersion": "1.0.2",
    "annotations": {"io.container.manager": "libpod", "org.example": "x"},
    "process": {"env": ["PATH=/bin", "GRAFT_CONV_PAIRS=0.0.0.0:80=nx4"], "capabilities": {"bounding": ["CAP_CHOWN"]}},
    "linux": {"namespaces": [{"type": "network"}, {"type": "user", "path": "/proc/1/ns/user"}], "seccomp": _SECCOMP},
    "hooks": {"createRuntime": [{"path": "/bin/x", "args": ["x"]}], "poststop": []},
}
_STATE = {"id": "web", "pid": 42, "bundle": "/b", "annotations": {"graft.policy": "web"}}
_RECORD = {
    "id": 7,
    "name": "web",
    "cgroup": "/sys/fs/cgroup/docker/web",
    "transport": "swap",
    "netns": 12,
    "policy": "web",
    "endpoints": ["nx4"],
    "pid": 42,
    "cgroup_id": 99,
    "engine": "docker",
    "relay": "splice",
}
RECORD = _dump(_RECORD)
_FEATURES = {"linux": {"seccomp": {"supportedFlags": ["SECCOMP_FILTER_FLAG_LOG"]}}}
_INSPECTED = f"{ID} /web 42\n".encode()
_VERDICT = _dump({"depends_on": {"boot": "b"}, "problem": ""})
_EPOLL = b"tfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:9\n"

_POLICY = b"""name: web
endpoints: {own: "0.0.0.0:8082"}
ingress:
  - {bind: "0.0.0.0:80-90", endpoint: nx4}
  - bind: "[::]:80"
    endpoint: nx6
egress:
  - {to: 10.0.0.0/8, ports: [80, 443], action: deny}
default: {bind: deny}
"""


def _btf_seed() -> bytes:
    blob = Blob()
    blob.type(1, "int", 4, [], fixed=struct.pack("<I", 32))  # 1
    blob.type(5, "", 8, [blob.member("deep", 1, 0)])  # 2: an anonymous union
    blob.type(4, "thing", 16, [blob.member("first", 1, 0), blob.member("", 2, 64)])  # 3
    blob.type(8, "alias", 1, [])  # 4
    return blob.build()


def _netlink(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 0, 0) + body


_FAILED = _netlink(2, struct.pack("=i", -2))
_SOCKET = struct.pack("=BBBB2s2s16s16sIII5I", 2, 10, 0, 0, b"\0\x50", b"\0\0", bytes(16), bytes(16), *[0] * 7, 77)
_SOCKET += struct.pack("=HHB3x", 5, 11, 1) + struct.pack("=HHQ", 12, 21, 4711)
_STORED = struct.pack("=HHHHHHIHHI", 24, 20, 20, 1, 8, 1, 8, 8, 3, 7)
_STATUS = b"Name:\ta\nState:\tS (sleeping)\nTgid:\t42\nPPid:\t7\nvoluntary_ctxt_switches:\t3\n"
_STATUS += b"nonvoluntary_ctxt_switches:\t4\n"
_INOTIFY = struct.pack("=iIII", 1, 0x40000100, 0, 16) + b"docker".ljust(16, b"\0")
_SAVED = envelope.encode({"name": "nx4", "endpoint": "0.0.0.0:80"})
_EXPORTED = b"attachments: [{container: docker:web, policy: {name: p, default: deny}}]\n"


def _saved_endpoint(raw: bytes) -> None:
    """As a damaged file is read, and as one with the right checksum is that makes no sense."""
    with contextlib.suppress(ValueError, RecursionError):
        read_endpoint_file(plain_document(json.loads(raw[raw.find(b"\n") + 1 :])))
    read_endpoint_file(plain_document(envelope.decode(raw, "f")))


READERS = [
    Reader("policy", lambda raw: load_policy(decode_policy(raw, "p"), "p", KNOWN), (GraftError,), (_POLICY,)),
    Reader("policy YAML", lambda raw: read_document(text_of(raw)), (), (_POLICY,)),
    Reader("GRAFT_CONV_PAIRS", _pairs, (GraftError,), (b"0.0.0.0:80=nx4, [::]:1-65534=nx6", b"*:80-90=nx4 *:85=nx4")),
    Reader("-i", lambda raw: parse_ingress_flag(text_of(raw)), (GraftError,), (b"0.0.0.0:80-90=nx4",)),
    Reader("-e", lambda raw: parse_egress_flag(text_of(raw)), (GraftError,), (b"10.0.0.0/8=nx4",)),
    Reader("config.json", _config, (GraftError,), (_dump(_CONFIG),)),
    Reader("seccomp profile", _profile, (GraftError,), (_dump(_SECCOMP),)),
    Reader("state", state.parse, (ValueError,), (_dump(_STATE), _dump({"state": _STATE, "fds": ["seccompFd"]}))),
    Reader("runtime options", lambda raw: options.parse(text_of(raw), "o"), (GraftError,), (b"runtime: runc\n",)),
    Reader(
        "runtime arguments", lambda raw: arguments.parse(text_of(raw).split(" ")), (), (b"--log x create -b /b id",)
    ),
    Reader("runtime features", features.supported_flags, (GraftError,), (_dump(_FEATURES),)),
    Reader("remembered features", features.parse_cache, (GraftError,), (_dump({"/bin/runc 1 2": True}),)),
    Reader("record", lambda raw: records.parse_record(raw, "7.json"), (GraftError,), (RECORD,)),
    Reader("docker inspect", lambda raw: parse_inspect("docker", _replaced(raw)), (GraftError,), (_INSPECTED,)),
    Reader("systemctl show", lambda raw: parse_show(_replaced(raw)), (), (b"ControlGroup=/a.service\nMainPID=7\n",)),
    Reader("daemon's answer", control.parse_answer, (GraftError,), (_dump({"serves": True}), _dump({"error": "x"}))),
    Reader("daemon's request", control.parse_request, (GraftError,), (_dump({"do": "attach", "container": 1}),)),
    Reader("self-test", lambda raw: selftest_result.parse(raw, {"boot": "b"}), (GraftError,), (_VERDICT,)),
    Reader("sockaddr", parse_sockaddr, (), (struct.pack("=H14x", 2), struct.pack("=H26x", 10))),
    Reader("unix sockaddr", unix_bind.parse_path, (), (struct.pack("=H", 1) + b"/own.sock\0",)),
    Reader("notification", Notification.unpack, (struct.error,), (bytes(80),)),
    Reader("BTF", _btf, (ValueError,), (_btf_seed(),)),
    Reader("sock_diag", _sockets, (ValueError, OSError), (_netlink(20, _SOCKET) + _netlink(3, bytes(4)), _FAILED)),
    Reader("listener of sock_diag", sockdiag.parse_listener, (ValueError,), (_SOCKET,)),
    Reader("socket of sock_diag", lambda raw: sockdiag.parse_socket(6, raw), (ValueError,), (_SOCKET + _STORED,)),
    Reader("/proc/PID/status", tasks.parse_activity, (), (_STATUS,)),
    Reader("/proc/TID/status", tasks.parse_thread_group, (), (_STATUS,)),
    Reader("/proc/PID/cgroup", cgroup.parse_membership, (), (b"1:memory:/a\n0::/b/c\n",)),
    Reader("mountinfo", cgroup.parse_mounts, (GraftError,), (b"28 21 0:24 / /sys/fs/cgroup rw - cgroup2 none rw\n",)),
    Reader("epoll's fdinfo", lambda raw: descriptors.parse_registrations(9, raw, frozenset({5}), 1), (), (_EPOLL,)),
    Reader("fdinfo", descriptors.parse_flags, (), (b"pos:\t0\nflags:\t02000002\n",)),
    Reader("inotify", lambda raw: [*inotify.parse_events(raw)], (struct.error,), (_INOTIFY,)),
    Reader("saved endpoint", _saved_endpoint, (GraftError,), (_SAVED,)),
    Reader("export", lambda raw: import_text(text_of(raw), "f"), (GraftError,), (b"version: 1\n" + _EXPORTED,)),
    Reader("terminal", _shown, (), (b"\x1b[2J\xe2\x80\xae",)),
]
