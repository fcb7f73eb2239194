// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Groups of sockets that share an address (SO_REUSEPORT): whether all of a group are the container's.
 *
 * Of a group the kernel delivers to one: by a hash, or to the one that a program chooses which any of them has set
 * (SO_ATTACH_REUSEPORT_CBPF). A lookup without a packet runs no such program, so which socket it finds says nothing about
 * where a packet goes. Another process of the network namespace can join a group, if it has the user of its first socket.
 *
 * Read from the kernel's own structures. A kernel without type information is not asked: there the socket that is found
 * counts for its group.
 */

#ifdef GRAFT_SOCK_REUSEPORT
#define GRAFT_GROUP_STEPS 512 /* each socket of a group is one, each cgroup between its own and the container's another */

/* The verifier permits no arithmetic on a socket that a lookup has found: its beginning is copied. */
struct group_check {
	u8 sk[GRAFT_SOCK_REUSEPORT > GRAFT_SOCK_CGROUP ? GRAFT_SOCK_REUSEPORT + 8 : GRAFT_SOCK_CGROUP + 8];
	void *group;
	void *common;  /* the cgroup of the socket that was found, which is the container's */
	void *cgroup;  /* that is looked at; NULL: the next socket's is */
	u64 next;
	u64 count;
};
BPF_PERCPU_ARRAY(group_checks, struct group_check, 1);

/* One socket of the group, or one cgroup above its own. Returns 0 where that one is not the container's. */
static __always_inline int check_step(volatile struct group_check *check, u64 cgroup)
{
	void *node, *socket;
	u64 id = 0;

	if (!check->cgroup) {
		socket = read_pointer(check->group + GRAFT_GROUP_SOCKETS + 8 * check->next);
		check->next++;
		check->cgroup = socket ? read_pointer(socket + GRAFT_SOCK_CGROUP) : 0;
		if (!check->cgroup)
			return 0;
		if (check->cgroup == check->common)
			check->cgroup = 0;
		return 1;
	}
	node = read_pointer(check->cgroup + GRAFT_CGROUP_NODE);
	if (!node || bpf_probe_read_kernel(&id, sizeof(id), node + GRAFT_NODE_ID))
		return 0;
	if (id == cgroup) {
		check->cgroup = 0;
		return 1;
	}
	node = read_pointer(check->cgroup + GRAFT_CGROUP_PARENT);
	check->cgroup = node ? node - GRAFT_CGROUP_SELF : 0;
	return node != 0;
}

/* Whether a socket, which is of that cgroup or below it, shares its address with none that is not. */
static __always_inline int is_groups_own(struct bpf_sock *sk, u64 cgroup)
{
	volatile struct group_check *check;
	int zero = 0, step;
	u16 count = 0;

	check = group_checks.lookup(&zero);
	if (!check || bpf_probe_read_kernel((void *)check->sk, sizeof(check->sk), sk))
		return 0;
	check->group = *(void *volatile *)(check->sk + GRAFT_SOCK_REUSEPORT);
	if (!check->group)
		return 1;
	if (bpf_probe_read_kernel(&count, sizeof(count), check->group + GRAFT_GROUP_COUNT))
		return 0;
	check->common = *(void *volatile *)(check->sk + GRAFT_SOCK_CGROUP);
	check->cgroup = 0;
	check->next = 0;
	check->count = count;
	for (step = 0; step < GRAFT_GROUP_STEPS; step++) {
		if (!check->cgroup && check->next >= check->count)
			return 1;
		if (!check_step(check, cgroup))
			return 0;
	}
	return 0;
}
#else
static __always_inline int is_groups_own(struct bpf_sock *sk, u64 cgroup)
{
	return 1;
}
#endif
