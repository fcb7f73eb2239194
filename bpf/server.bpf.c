// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Who has bound a place of an endpoint, as binds note it (`servers`), for the hook for packets: another socket may have the
 * port all the same (shared_port.bpf.c), and is to hear nobody who came for that one. A lookup would find only one of them.
 */

/* Whether a server's container is granted the place still: in the family of the place, or in that of a packet for it. */
static __always_inline int is_servers_place(struct server_place *key, struct server *server, u8 family)
{
	struct local_address place = { .port = key->port, .family = key->family };
	u32 id = server->container, endpoint = server->endpoint;
	struct container *container = containers.lookup(&id);
	struct endpoint *at = endpoints.lookup(&endpoint);
	struct request request;

	if (!container || !at || (family != key->family && !(at->flags & GRAFT_ENDPOINT_DUAL_STACK)))
		return 0;
	__builtin_memset(&request, 0, sizeof(request));
	__builtin_memcpy(request.addr, server->addr, 16);
	request.port = server->port;
	request.family = server->family;
	request.protocol = key->protocol;
	__builtin_memcpy(place.ip, key->addr, 16);
	return place_for(container, &request, &place, key->netns) != 0;
}

static __always_inline int is_same_request(struct server *one, struct server *other)
{
	return one->container == other->container && one->port == other->port && one->family == other->family &&
	       is_same_address(one->addr, other->addr);
}

/* At a bind that an endpoint has granted, when the kernel has done it: in the place of what this container noted for the same
 * request, or of a request that is not granted it any more. Where there is none, of another request of this container's, so
 * that one with many addresses takes no other's; or else of one that has several. (A port that the kernel has chosen is nobody
 * else's.) Returns 0 where there is no memory. */
static __always_inline int note_server(struct tag *tag, struct endpoint *endpoint, u16 port, u8 protocol)
{
	struct server_place key = { .netns = endpoint->netns, .port = port, .family = endpoint->family, .protocol = protocol };
	struct server server = { .bound = bpf_ktime_get_ns(), .container = tag->container, .endpoint = tag->endpoint,
				 .port = tag->port, .family = tag->family };
	u32 number, earlier, instead = GRAFT_SERVERS_AT_A_PLACE - 1;
	u32 seen[GRAFT_SERVERS_AT_A_PLACE] = {};
	struct server *found;
	int has_own = 0;

	if (!endpoint->port)
		return 1;
	__builtin_memcpy(key.addr, endpoint->addr, 16);
	__builtin_memcpy(server.addr, tag->addr, 16);
	for (number = 0; number < GRAFT_SERVERS_AT_A_PLACE; number++) {
		key.number = number;
		found = servers.lookup(&key);
		if (!found && !servers.insert(&key, &server))
			return 1;
		if (!found)
			found = servers.lookup(&key); /* another bind has noted itself there since */
		if (!found)
			return 0;
		if (is_same_request(found, &server) || !is_servers_place(&key, found, key.family)) {
			instead = number;
			break;
		}
		if (found->container == server.container) {
			has_own = 1;
			instead = number;
		}
		for (earlier = 0; earlier < GRAFT_SERVERS_AT_A_PLACE; earlier++)
			if (!has_own && seen[earlier] == found->container)
				instead = number;
		seen[number] = found->container;
	}
	key.number = instead;
	return !servers.update(&key, &server);
}

/* Whether another container, which is granted that place for packets of that family, has bound it after `since`. */
static __always_inline int is_anothers_place(struct server_place *key, u32 container, u64 since, u8 family)
{
	struct server *server;
	u32 number;

	for (number = 0; number < GRAFT_SERVERS_AT_A_PLACE; number++) {
		key->number = number;
		server = servers.lookup(key);
		if (!server)
			return 0;
		if (server->container != container && server->bound > since && is_servers_place(key, server, family))
			return 1;
	}
	return 0;
}
