"""`graft ep add`, `set`, `del`: endpoints changed in the maps, and in what is saved."""

from __future__ import annotations

from graft.commands import saving
from graft.model.endpoint import Endpoint
from graft.saved.model import outlives_boot
from graft.saved.store import ENDPOINTS, Store
from graft.state.installation import Installation


def add(graft: Installation, endpoint: Endpoint, save: bool = True) -> str | None:
    """Add an endpoint, and save it. Returns why it was not saved, None if it was (or was not to be).

    Raises ConflictError, NotFoundError, KernelError; nothing is changed then.
    """
    obstacle = _why_not_saved(endpoint) if save else None
    with saving.endpoint(graft.settings, endpoint, save and obstacle is None), graft.transaction() as change:
        change.endpoints.add(endpoint)
    return obstacle


def change(graft: Installation, endpoint: Endpoint, save: bool = True) -> str | None:
    """Change an endpoint, as `add`."""
    graft.finish_records()  # before rules get another number, by which it is known what they tell of
    obstacle = _why_not_saved(endpoint) if save else None
    if save and obstacle is None and graft.endpoints.find(endpoint.name).declared:
        obstacle = "a policy declares it; the next `graft up` takes the address from there"
    with saving.endpoint(graft.settings, endpoint, save and obstacle is None), graft.transaction() as changes:
        containers = changes.containers
        done = changes.endpoints.replace(endpoint, containers.asked_rulesets(), containers.own_rulesets())
        changes.endpoints.complete(done)
    return obstacle


def delete(graft: Installation, name: str, force: bool = False, save: bool = True) -> None:
    """Delete an endpoint, also one that is saved and was not restored, or cannot be read. Raises NotFoundError,
    ConflictError.
    """
    store = Store(graft.settings)
    if not store.exists:
        with graft.transaction() as changes:
            changes.endpoints.delete(name, force)
        return
    with store.locked(saves=save):
        is_saved = store.has_endpoint(name)
        is_there = name in graft.endpoints.by_name()
        with graft.transaction() as changes:
            if is_there or not is_saved:
                changes.endpoints.delete(name, force)
        if is_saved and save:
            store.remove_endpoint(name)
        elif is_saved:
            store.pause(ENDPOINTS, name)


def _why_not_saved(endpoint: Endpoint) -> str | None:
    if outlives_boot(endpoint):
        return None
    return f"its namespace is that of a process ({endpoint.netns}), which ends with this boot"
