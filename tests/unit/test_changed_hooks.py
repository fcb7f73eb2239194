"""Which programs a change of the hooks' text reaches: controls compile only those."""

from __future__ import annotations

import pytest

from tests.hostile.changed_hooks import programs_reached

TEXT = """\
#define LIMIT 4

struct tag {
	int port;
};

static __always_inline int port_of(struct tag *tag)
{
	return tag->port;
}

#define IS_OPEN(tag) (port_of(tag) != 0)

static __always_inline int may_listen(struct tag *tag)
{
	return IS_OPEN(tag);
}

int graft_listen(struct tag *ctx)
{
	return may_listen(ctx);
}

int graft_bind(struct tag *ctx)
{
	return ctx->port < LIMIT;
}
"""


@pytest.mark.parametrize(
    ("piece", "instead", "reached"),
    [
        ("return tag->port;", "return 0;", {"graft_listen"}),
        ("(port_of(tag) != 0)", "1", {"graft_listen", "graft_bind"}),
        ("ctx->port < LIMIT", "1", {"graft_bind"}),
        ("LIMIT 4", "LIMIT 5", {"graft_listen", "graft_bind"}),
        ("int port;", "long port;", {"graft_listen", "graft_bind"}),
        ("return may_listen(ctx);", "return 1;", {"graft_listen"}),
    ],
)
def test_a_change_reaches_who_calls_it(piece: str, instead: str, reached: set[str]) -> None:
    assert TEXT.count(piece) == 1
    assert programs_reached(TEXT, TEXT.replace(piece, instead), {"graft_listen", "graft_bind"}) == reached
