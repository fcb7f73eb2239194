"""Which policy a container asks for, and whether the request can come from its image.

An annotation comes from the operator; the environment may come from the image. So the environment reaches only
policies with ``open: true``, and endpoints added with ``--open``. podman (4.3, for example) copies an image's
annotations to the container: there an annotation counts as the image's, unless the operator trusts images
(docs/runtime.md).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import ConflictError, NotFoundError, RefusedError, UsageError
from graft.oci.bundle import capability_sets, cgroups_path, container_annotations, environment
from graft.oci.options import FILE, RuntimeOptions

if TYPE_CHECKING:
    from graft.model.endpoint import Endpoint
    from graft.model.settings import Settings
    from graft.policy.model import Policy
    from graft.policy.policy_file import PolicyFile

POLICY_ANNOTATION = "graft.policy"
NET_ADMIN_ANNOTATION = "graft.allow-net-admin"
POLICY_VARIABLE = "GRAFT_POLICY"
PAIRS_VARIABLE = "GRAFT_CONV_PAIRS"
# Annotations by which crun takes its filter, or the filter's listener, from elsewhere.
_CRUN_FILTERS = ("run.oci.seccomp.receiver", "run.oci.seccomp.plugins", "run.oci.seccomp_bpf_data")
# Those by which it puts a container into a cgroup below the container's own (crun(1)).
_CRUN_SUBGROUPS = ("run.oci.systemd.subgroup", "run.oci.delegate-cgroup")
# All of crun's own begin so. With one that an image sets, crun would do what the image wants, as root: it writes what
# hooks say to any file of the host's, and Graft's container has a hook. Those that podman itself writes are allowed.
_CRUN = "run.oci."
_PODMANS_OWN = ("run.oci.keep_original_groups", "run.oci.mount_context_type")
_CRIU = "org.criu."  # of these one names a file for CRIU, with scripts that it runs as root
# What begins so is a property of the container's scope, which crun asks systemd for, as root: `Slice` puts a container
# elsewhere, `Wants` and `Conflicts` start and stop any unit of the host. podman itself writes the two below.
_SYSTEMD = "org.systemd.property."
_PODMANS_PROPERTIES = {"KillSignal": re.compile(r"[0-9]{1,3}"), "TimeoutStopUSec": re.compile(r"uint64 [0-9]{1,20}")}


class Source(enum.Enum):
    """Where a request comes from, as messages name it."""

    ANNOTATION = f"annotation {POLICY_ANNOTATION}"
    POLICY = POLICY_VARIABLE
    PAIRS = PAIRS_VARIABLE


@dataclass(frozen=True, slots=True)
class Request:
    """What a container asks for: a policy by name or path, or pairs of binds and endpoints."""

    source: Source
    value: str


def requested(config: Mapping[str, Any]) -> Request | None:
    """The request in ``config``, None where there is none. Raises UsageError, ConflictError."""
    annotated = container_annotations(config).get(POLICY_ANNOTATION)
    if annotated is not None:
        return _request(Source.ANNOTATION, annotated)
    variables = environment(config)
    named, pairs = variables.get(POLICY_VARIABLE), variables.get(PAIRS_VARIABLE)
    if named and pairs:
        raise ConflictError(f"{POLICY_VARIABLE} and {PAIRS_VARIABLE} are both set", "leave one of them out")
    if named:
        return _request(Source.POLICY, named)
    return _request(Source.PAIRS, pairs) if pairs else None


def _request(source: Source, value: str) -> Request:
    if not value.strip():
        raise UsageError(f"{source.value}: empty", "the name of a policy")
    return Request(source, value.strip())


def annotations_are_trusted(config: Mapping[str, Any], options: RuntimeOptions) -> bool:
    """Whether the operator set the annotations: no image can have set them, or the operator trusts images."""
    if options.trust_annotations is not None:
        return options.trust_annotations
    return not _is_podmans(config)


def _is_podmans(config: Mapping[str, Any]) -> bool:
    """Whether the engine is podman. What its annotations say of that an image's annotations may replace, and newer
    versions write ``io.podman.*`` for some containers only; the cgroup's name is podman's own.
    """
    found = container_annotations(config)
    named = found.get("io.container.manager") == "libpod" or any(key.startswith("io.podman.") for key in found)
    return named or "libpod" in cgroups_path(config)


def check_annotations(config: Mapping[str, Any], options: RuntimeOptions, notified: bool) -> None:
    """Raises RefusedError for annotations of crun's that an image may have set, and ConflictError for those that would
    have it put the container into another cgroup than Graft attaches, or (``notified``) its seccomp listener elsewhere.
    """
    found = container_annotations(config)
    if not annotations_are_trusted(config, options):
        _refuse_annotations_for_crun(found)
    _refuse_leaving(found)
    for name in _CRUN_FILTERS:
        if notified and found.get(name):
            raise ConflictError(f"annotation {name}: the container's seccomp filter comes from elsewhere")


def check_cgroup(config: Mapping[str, Any], options: RuntimeOptions) -> None:
    """Of a container that asks for no policy: its cgroup may be below one that has a policy, which goes for all in it.
    Raises ConflictError and RefusedError for annotations that may be the image's, by which crun would put it elsewhere.
    """
    if annotations_are_trusted(config, options):
        return
    found = container_annotations(config)
    _refuse_leaving(found)
    _refuse_acting_outside(found)


def _refuse_leaving(found: Mapping[str, str]) -> None:
    for name in _CRUN_SUBGROUPS:
        if ".." in found.get(name, "").split("/"):
            raise ConflictError(f"annotation {name}: it leads out of the container's cgroup")


def _images_annotation(name: str, what: str) -> RefusedError:
    return RefusedError(
        f"annotation {name}: podman copies an image's annotations, which cannot {what}",
        f"leave it out, or trust-annotations: true in {FILE}",
    )


def _is_podmans_property(name: str, value: str) -> bool:
    known = _PODMANS_PROPERTIES.get(name.removeprefix(_SYSTEMD))
    return known is not None and known.fullmatch(value) is not None


def _refuse_annotations_for_crun(found: Mapping[str, str]) -> None:
    for name, value in found.items():
        if value and name.startswith(_CRUN) and name not in _PODMANS_OWN:
            raise _images_annotation(name, "tell crun what to do")
    _refuse_acting_outside(found)


def _refuse_acting_outside(found: Mapping[str, str]) -> None:
    """By annotations that have systemd (another slice, processes moved into the container's scope) or CRIU act."""
    for name, value in found.items():
        if name.startswith(_CRIU):
            raise _images_annotation(name, "configure CRIU")
        if name.startswith(_SYSTEMD) and not _is_podmans_property(name, value):
            raise _images_annotation(name, "have crun ask systemd for something")


def check_capabilities(config: Mapping[str, Any], options: RuntimeOptions, own_user_namespace: bool) -> None:
    """Raises RefusedError for a container with CAP_NET_ADMIN over the host's own namespaces.

    ``own_user_namespace``: its user namespace is not the host's, so that the capability does not apply to the host.
    """
    sets = capability_sets(config, "CAP_NET_ADMIN")
    if not sets or own_user_namespace or options.allow_net_admin:
        return
    allowed = container_annotations(config).get(NET_ADMIN_ANNOTATION) == "true"
    if allowed and annotations_are_trusted(config, options):
        return
    raise RefusedError(
        f"the container has CAP_NET_ADMIN ({', '.join(sets)}): with a socket of the host's stack it could change"
        " the host's own network",
        f"drop it, or allow it: annotation {NET_ADMIN_ANNOTATION}=true, or allow-net-admin: true in {FILE}",
    )


def find_policy(settings: Settings, source: Source, value: str, trusted: bool) -> PolicyFile:
    """The file of the policy ``value``, before it is read. It is a name, or from the
    operator (``trusted``) also an absolute path: an image that names a path could name a file of its own, which the
    engine has unpacked on the host. Raises GraftError.
    """
    from graft.model.endpoint import MAX_POLICY_NAME, parse_name
    from graft.model.settings import POLICIES, POLICY_FOLDER
    from graft.policy.policy_file import PolicyFile

    if value.startswith("/"):
        if source is not Source.ANNOTATION:
            raise RefusedError(f"{source.value}: a container's environment can name a policy, not a path", "its name")
        if not trusted:
            raise RefusedError(
                f"{source.value}: not a path: podman copies an image's annotations, which can only name a policy",
                f"its name, or trust-annotations: true in {FILE}",
            )
        return PolicyFile.of(Path(value))
    parse_name(value, source.value, longest=MAX_POLICY_NAME)
    folders = (settings.state_dir / POLICY_FOLDER, POLICIES)
    passed: list[Path] = []
    for folder in folders:
        path = folder / f"{value}.yaml"
        if path.exists():
            for one in (folder.parent, folder, path):
                _check_roots(source, one)
            return PolicyFile.of(path, tuple(passed))
        passed.append(path)
    places = " or ".join(str(folder) for folder in folders)
    raise NotFoundError(f"{source.value}: policy {value!r} not found", f"a file {value}.yaml in {places}")


def _check_roots(source: Source, path: Path) -> None:
    """Raises RefusedError where others may have written what is at ``path``."""
    from graft.kernel.ownership import problem_of

    if problem := problem_of(path.stat()):
        raise RefusedError(f"{source.value}: {path}: {problem}", f"look at what is there, then: chmod go-w {path}")


def choose_policy(
    settings: Settings,
    request: Request,
    config: Mapping[str, Any],
    options: RuntimeOptions,
    known: Mapping[str, Endpoint],
) -> Policy:
    """The policy that a container asks for. Raises GraftError for one that it may not have, or that is invalid."""
    if request.source is Source.PAIRS:
        return policy_from_pairs(request.value, known)
    from graft.policy.files import read_policy
    from graft.policy.model import Origin
    from graft.policy.reader import load_policy

    trusted = request.source is Source.ANNOTATION and annotations_are_trusted(config, options)
    if request.source is Source.ANNOTATION and not trusted:
        _refuse_two_requests(request.value, environment(config))
    file = find_policy(settings, request.source, request.value, trusted)
    policy = load_policy(read_policy(file.path, regular_only=True), str(file.path), known)
    if not policy.open and not trusted:
        why = "podman copies an image's annotations" if request.source is Source.ANNOTATION else "an image can set it"
        more = f", or trust-annotations: true in {FILE}" if request.source is Source.ANNOTATION else ""
        raise RefusedError(
            f"{request.source.value}: the policy {request.value!r} is not open to containers that ask for it ({why})",
            f"open: true in {file.path}{more}",
        )
    return replace(policy, file=file, origin=Origin.OPERATOR if trusted else Origin.ASKED)


def _refuse_two_requests(annotated: str, variables: Mapping[str, str]) -> None:
    """Raises ConflictError where the environment asks for something else than an annotation that may be the image's:
    either may be the operator's own choice.
    """
    for name in (POLICY_VARIABLE, PAIRS_VARIABLE):
        if variables.get(name) and variables[name].strip() != annotated:
            raise ConflictError(
                f"{Source.ANNOTATION.value} and {name} differ, and either may be the image's (podman copies an image's"
                " annotations)",
                f"the same policy in both, or trust-annotations: true in {FILE}",
            )


def policy_from_pairs(text: str, known: Mapping[str, Endpoint]) -> Policy:
    """The policy of GRAFT_CONV_PAIRS: ``ADDR:PORT[-PORT]=ENDPOINT``, several with spaces or commas between them.

    An image can set it, so the limits of a policy file (graft/policy/limits.py) are checked before it is parsed, and
    of map entries it may need fewer.
    Raises UsageError, and NotFoundError or RefusedError for an endpoint that does not exist or is not open.
    """
    from graft.policy.limits import check_count, check_text
    from graft.policy.model import Origin, Policy, ingress_rules

    check_text(text, PAIRS_VARIABLE)
    pairs = text.replace(",", " ").split()
    check_count(len(pairs), PAIRS_VARIABLE)
    if not pairs:  # a policy without a rule, which leaves all else as it is, would be one that permits everything
        raise UsageError(f"{PAIRS_VARIABLE}: no pair", "ADDR:PORT=ENDPOINT")
    ingress, unix_ingress = ingress_rules(pairs, PAIRS_VARIABLE)
    policy = Policy(name="pairs", ingress=ingress, unix_ingress=unix_ingress, origin=Origin.PAIRS)
    for rule in policy.every_ingress:
        _require_open(known, rule.endpoint)
    return policy


def _require_open(known: Mapping[str, Endpoint], name: str) -> None:
    endpoint = known.get(name)
    if endpoint is None:
        raise NotFoundError(
            f"{PAIRS_VARIABLE}: endpoint {name!r} not found", f"graft ep add {name} ADDR:PORT --open, and start again"
        )
    if not endpoint.open:
        raise RefusedError(
            f"{PAIRS_VARIABLE}: the endpoint {name!r} is not open to containers that ask for it",
            f"graft ep set {name} {endpoint.spec} --open",
        )
