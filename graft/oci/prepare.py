"""What the wrapper does before it executes the real runtime for `create` or `run`: it finds every error in the
container's request, edits the bundle, and starts the shim.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from graft.datapath import dataplane
from graft.errors import NotFoundError
from graft.kernel import cgroup, netns
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci import shim
from graft.oci.arguments import Invocation
from graft.oci.bundle import (
    COMPILED_HOOK,
    HOOK,
    Edit,
    divides_sockets,
    edit_config,
    has_own_user_namespace,
    namespace_path,
    write_config,
)
from graft.oci.features import supports_wait_killable
from graft.oci.options import RuntimeOptions
from graft.oci.plan import Plan
from graft.oci.request import check_annotations, check_capabilities, choose_policy, requested
from graft.state.compiled_policy import CompiledPolicy, compile_for
from graft.state.installation import known_endpoints

_MIN_AGE_SECONDS = 60.0
_COMPILED_HOOK = Path(__file__).with_name(COMPILED_HOOK)


class Caller(NamedTuple):
    """The process that becomes the runtime: its cgroup, and a pidfd of it."""

    cgroup: Path
    pidfd: int


StartShim = Callable[[Plan, socket.socket, socket.socket, int, int], None]
"""`shim.start`, or what does the same."""


def prepare(
    invocation: Invocation,
    config: Mapping[str, Any],
    options: RuntimeOptions,
    runtime: str,
    caller: Caller | None = None,
    start_shim: StartShim | None = None,
) -> None:
    """Edit the bundle for ``runtime``, and start a shim, for ``caller``, by default this process itself.

    Raises GraftError, and leaves nothing behind then.
    """
    caller = caller or Caller(cgroup.of_process(os.getpid()), os.pidfd_open(os.getpid()))
    settings = Settings.from_environment()
    request = requested(config)
    assert request is not None
    check_capabilities(config, options, has_own_user_namespace(config))
    dataplane.up(settings)
    known = known_endpoints(settings)
    policy = choose_policy(settings, request, config, options, known)
    compiled = compile_for(policy, policy.resolve(known))
    remove_stale_folders(settings)
    folder, lock = _make_folder(settings)
    try:
        transport = _choose_transport(config, settings, compiled)
        if transport is Transport.BORN and not divides_sockets(config):
            transport = Transport.SWAP
        edit = _plan_edit(settings, folder, transport, runtime, compiled.bears_datagrams)
        check_annotations(config, options, notified=edit.listener is not None)
        edited = edit_config(config, edit)
        plan = Plan(
            settings,
            policy,
            transport,
            invocation.id,
            folder,
            caller.cgroup,
            edit.wait_killable,
            compiled.bears_datagrams,
        )
        with shim.listen(folder / shim.HOOK_SOCKET) as hook, shim.listen(folder / shim.LISTENER_SOCKET) as listeners:
            (start_shim or shim.start)(plan, hook, listeners, lock, caller.pidfd)
        write_config(invocation.config, edited)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def shims_folder(settings: Settings) -> Path:
    """The folder with a folder of each shim."""
    return settings.run_dir / "oci"


def _make_folder(settings: Settings) -> tuple[Path, int]:
    """A shim's folder, and a descriptor of it with the lock that marks it as in use."""
    folder = shims_folder(settings) / os.urandom(6).hex()
    folder.mkdir(mode=0o700, parents=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def remove_stale_folders(settings: Settings) -> None:
    """Remove the folders of shims that were killed. New ones stay: they may not be locked yet."""
    for folder in shims_folder(settings).glob("*/"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _MIN_AGE_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _choose_transport(config: Mapping[str, Any], settings: Settings, compiled: CompiledPolicy) -> Transport:
    path = namespace_path(config, "network")
    if path == "":
        return compiled.supervised_transport
    try:
        joined = netns.cookie(None if path is None else Path(path))
    except OSError as error:
        raise NotFoundError(f"linux.namespaces: network: {path}: {error.strerror}") from error
    return Transport.DIRECT if joined == netns.cookie(settings.host_netns) else compiled.supervised_transport


def _attach_command(python: tuple[str, ...]) -> tuple[str, ...]:
    """The hook that has the shim attach the container: compiled, or else in Python."""
    compiled = str(_COMPILED_HOOK)
    is_compiled = os.access(compiled, os.X_OK) and not os.environ.get("GRAFT_NO_COMPILED")
    return (compiled, "attach") if is_compiled else (*python, "attach")


def _plan_edit(settings: Settings, folder: Path, transport: Transport, runtime: str, datagrams: bool) -> Edit:
    command = (sys.executable, "-I", "-m", HOOK)  # -I: nothing is imported from the working directory
    variables = {**settings.environment, "PATH": os.environ.get("PATH", os.defpath)}
    supervised = transport.is_supervised
    return Edit(
        create_runtime=(*_attach_command(command), str(folder / shim.HOOK_SOCKET)),
        poststop=None if supervised else (*command, "reap"),
        environment=tuple(f"{name}={value}" for name, value in variables.items()),
        listener=str(folder / shim.LISTENER_SOCKET) if supervised else None,
        own_listeners=str(shims_folder(settings)),
        metadata=folder.name,
        wait_killable=supervised and supports_wait_killable(runtime, shims_folder(settings) / "features.json"),
        born=transport is Transport.BORN,
        datagrams=transport is Transport.SWAP and datagrams,
    )
