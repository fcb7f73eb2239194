/* The structures that Graft's BPF programs and its Python controller share.
 *
 * graft/datapath/layout.py has the same layouts for Python; tests/unit/test_layout.py compares the two.
 * Ports are in host order unless a name ends in _be; addresses are always in network order, and an
 * IPv4 address fills the first four bytes of its field.
 */
#ifndef GRAFT_H
#define GRAFT_H

#define GRAFT_NAME_LEN 32 /* an endpoint's name with its closing NUL */

#define GRAFT_IPV4 4
#define GRAFT_IPV6 6
#define GRAFT_UNIX 1 /* in ingress_key.family only: addr is the key of a unix socket's path, for supervisors to look up */

/* Bits of endpoint.protocols. */
#define GRAFT_TCP 1
#define GRAFT_UDP 2

/* Bits of endpoint.flags. */
#define GRAFT_ENDPOINT_OPEN 1 /* a container may request it through its environment */
#define GRAFT_ENDPOINT_DECLARED 2 /* declared by a policy: removed with the last rule that names it */
#define GRAFT_ENDPOINT_DUAL_STACK 4 /* an IPv6 endpoint that accepts IPv4 clients too */
#define GRAFT_ENDPOINT_UNIX 8 /* a unix socket of the host: a relay joins TCP connections with it; addr is loopback's */
#define GRAFT_ENDPOINT_HAS_PORT 16 /* in desk.endpoint_flags only: it is not dynamic */

/* Where a socket lives. */
#define GRAFT_HOME_CONTAINER 0
#define GRAFT_HOME_HOST 1
#define GRAFT_HOME_FERRY 2 /* a socket of the container's ferry, on the host's loopback */

/* How a container's sockets reach the host's stack. */
#define GRAFT_TRANSPORT_DIRECT 1
#define GRAFT_TRANSPORT_SWAP 2
#define GRAFT_TRANSPORT_SPLICE 3
#define GRAFT_TRANSPORT_BORN 4

/* What happens with an address that no rule names (container.bind_default, connect_default). */
#define GRAFT_DEFAULT_CONTAINER 0
#define GRAFT_DEFAULT_DENY 1

/* Bits of container.flags. */
#define GRAFT_CONTAINER_DENIES 1 /* some rule denies a destination, whatever the defaults are */
#define GRAFT_CONTAINER_OTHERS 2 /* sockets of protocols that no rule can name are left alone */
#define GRAFT_CONTAINER_ICMP 4   /* some rule is for ICMP: sockets that ping are judged by the rules */
#define GRAFT_CONTAINER_MULTICAST 8 /* a rule names an endpoint with groups, or grants sending to some */

/* What an egress rule says about a destination. NONE: no rule covers it, the default decides. */
#define GRAFT_VERDICT_NONE 0
#define GRAFT_VERDICT_GRANT 1
#define GRAFT_VERDICT_DENY 2
#define GRAFT_VERDICT_CONTAINER 3
#define GRAFT_VERDICT_NAMED 4 /* in the maps only: a grant, of a rule for this one IPv4 address */

/* `endpoints`: id -> struct endpoint. */
struct endpoint {
	__u64 netns;     /* cookie of the network namespace that the address belongs to */
	__u8 addr[16];
	__u16 port;      /* 0: dynamic, the kernel picks */
	__u8 family;     /* GRAFT_IPV4 or GRAFT_IPV6 */
	__u8 protocols;
	__u16 last_port; /* of a range that begins at `port`; 0: it is one port, or dynamic */
	__u16 flags;
};

/* `endpoint_names`: struct endpoint_name -> id. */
struct endpoint_name {
	char name[GRAFT_NAME_LEN];
};

/* `groups`: which multicast groups an endpoint has, and which a ruleset: those of all endpoints that binds become. */
struct group {
	__u32 id;        /* of the endpoint or the ruleset: no two things have the same one */
	__u8 family;
	__u8 zero[3];
	__u8 addr[16];
};

/* `containers`: id -> struct container. One update of an entry switches a whole policy: the rules
 * of the new one are written, under a ruleset number of their own, before the entry names it. */
struct container {
	__u64 netns;     /* cookie of the namespace that its processes live in */
	__u32 ruleset;
	__u8 transport;
	__u8 bind_default;
	__u8 connect_default;
	__u8 flags;
	__u64 host_netns; /* of the host's namespace; 0 in a container with a supervisor */
};

/* `ingress`: which bind becomes which endpoint. A range of ports is split into prefixes, which is
 * why the port comes last and in network order. */
struct ingress_key {
	__u32 prefixlen;
	__u32 ruleset;
	__u8 protocol;   /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 family;     /* of the address that the program binds */
	__u8 any;        /* 1: the rule applies to any address, addr is zero */
	__u8 zero;
	__u8 addr[16];
	__be16 port_be;
	__u16 zero2;
};
#define GRAFT_INGRESS_FIXED_BITS (8 * (4 + 4 + 16)) /* all of the key before the port */

struct ingress_value {
	__u32 endpoint;
	__u16 first_port; /* of the rule's range, where the endpoint is a range of as many ports */
	__u16 zero;
};

/* `egress`: the longest prefix that contains a destination -> the node that its ports are listed under. */
struct egress_key {
	__u32 prefixlen;
	__u32 ruleset;
	__u8 protocol;   /* IPPROTO_ICMP for ICMPv6 too */
	__u8 family;
	__u8 zero[2];
	__u8 addr[16];
};
#define GRAFT_EGRESS_FIXED_BITS (8 * (4 + 4)) /* all of the key before the address */

struct egress_value {
	__u32 node;
	__u32 verdict;  /* where it is the same for all ports, or 0 */
	__u32 endpoint;
};

/* `host_addresses`, `noted_addresses`, `broadcasts`: this -> 1. An address of the host's in a namespace, or of one of its
 * links; IPv4 in the first four bytes. */
struct host_address {
	__u64 netns;
	__u8 addr[16];
	__u64 family;
};

/* `egress_ports`: (node, port prefix) -> what to do. */
struct egress_port_key {
	__u32 prefixlen;
	__u32 ruleset;
	__u32 node;
	__be16 port_be;
	__u16 zero;
};
#define GRAFT_EGRESS_PORT_FIXED_BITS (8 * (4 + 4))

struct egress_port_value {
	__u32 verdict;
	__u32 endpoint;
};

/* `uses`: a ruleset and an endpoint that its rules name -> GRAFT_USE_*. No hook reads this: it spares commands a walk
 * through the rules of all containers. */
#define GRAFT_USE_INGRESS 1 /* binds become the endpoint */
#define GRAFT_USE_PORT_0 2  /* those of port 0 too */
struct use {
	__u32 ruleset;
	__u32 endpoint;
};

/* `scopes`: cgroup storage, one for each cgroup that the programs are attached to. container 0 is a
 * cgroup of Graft's own, where only tagged sockets are checked. */
struct scope {
	__u32 container;
	__u32 zero;
};

/* `tags`: socket storage, cloned to accepted sockets. It records what happened, never what is allowed: a hook that
 * needs to know whether a socket is bound to its endpoint checks its local address (local_address.bpf.c). */
#define GRAFT_LENT_ADDRESS 1
#define GRAFT_LENT_PORT 2
#define GRAFT_OWNED_KNOWN 1
#define GRAFT_OWNED_UNKNOWN 2 /* only in an answer to a ferry: the container has a socket there, and nobody said whose */
struct tag {
	__u32 container;
	__u32 endpoint;
	__u8 home;
	__u8 family;      /* of the address that the program requested */
	__u16 port;       /* the port that the program requested; 0: one that the kernel picks */
	__u16 bound_port; /* the port that its last bind to the endpoint got; 0: none yet */
	__u16 open_port;  /* the port at which any client may reach it; 0: none */
	__u8 addr[16];    /* the address that the program requested */
	__u32 source;     /* the endpoint that a connect took its local address or port from; 0: none */
	__u8 lent;        /* GRAFT_LENT_*: which of the two, when it took them */
	__u8 at_unix;     /* 1: the endpoint was a unix socket at the bind: whatever became of it, its clients come by graftd */
	__u8 lent_family; /* of that endpoint, which may be gone since */
	__u8 owned;       /* GRAFT_OWNED_* */
	__u32 binder;     /* the thread whose bind wrote this last; 0: none has */
	__u32 uid;        /* for whom a supervisor made a datagram socket, where it is owned; of a ferry's: its answer */
	__u32 gid;
	__u32 zero;
	__u64 found_endpoint; /* what the rules of a ruleset, which never change, say of that request: see found_rule */
	__u64 found_port;
	__u64 netns;      /* the cookie of its namespace; 0: not read yet */
	__u64 since;      /* when it got its port, or was found to have it, in ns of CLOCK_MONOTONIC */
};

/* `servers`: a place of an endpoint's, at which several containers may serve -> which one has bound it, when, and what it
 * requested. No hook is called when a socket is closed, so this says nothing about one that is there, and whether the
 * container is granted the place still is judged anew. */
#define GRAFT_SERVERS_AT_A_PLACE 4
struct server_place {
	__u64 netns;
	__u8 addr[16];
	__u16 port;
	__u8 family;
	__u8 protocol;
	__u32 number;     /* below GRAFT_SERVERS_AT_A_PLACE */
};

struct server {
	__u64 bound;      /* in ns of CLOCK_MONOTONIC */
	__u32 container;
	__u32 endpoint;
	__u8 addr[16];
	__u16 port;
	__u8 family;
	__u8 zero[5];
};

/* `options`: socket storage, which options a program set before its socket was swapped. Only their
 * names: the values are read from the socket, because a call that the kernel refused is recorded too. */
#define GRAFT_OPTIONS_MAX 32
struct option {
	__u16 level;
	__u16 name;
};

struct options {
	__u32 count;
	__u32 overflow;  /* 1: more options than slots, read every known one */
	struct option option[GRAFT_OPTIONS_MAX];
	__u32 asked_group; /* of TCP: how often SO_REUSEPORT was set, or is about to be (shared_port.bpf.c) */
	__u32 borrowed;    /* of TCP: how often an endpoint was about to lend it a port for a connect */
};

/* `desk_slots`: a supervisor's process -> its desk, and the cgroup that the process must be in. */
struct desk_slot {
	__u64 cgroup;
	__u32 desk;
	__u32 zero;
};

/* `desks`: a supervisor's questions about a socket, mapped into its memory. It writes the question,
 * calls getsockname() on a copy of the socket's descriptor, and reads the hook's answer: one
 * system call for all that a decision needs, from the same code that enforces it. A process without a desk
 * cannot ask.
 */
#define GRAFT_CALL_BIND 0
#define GRAFT_CALL_CONNECT 1
#define GRAFT_CALL_LISTEN 2
#define GRAFT_CALL_REFUSED 128 /* with one of them: no question, the supervisor has refused it */

/* desk.next_home: how the hook tags the next socket that the supervisor makes. */
#define GRAFT_NEXT_HOME_NONE 0
#define GRAFT_NEXT_HOME_CONTAINER 1 /* its home + 1 */
#define GRAFT_NEXT_HOME_HOST 2
#define GRAFT_NEXT_HOME_FERRY 3

/* Bits of desk.probed. */
#define GRAFT_PROBED 1       /* references was read from the kernel */
#define GRAFT_PROBED_EPOLL 2 /* the socket's file is registered with an epoll instance */
#define GRAFT_PROBED_FLAGS 4 /* flags was read from the kernel */
#define GRAFT_PROBED_OWNER 8 /* uid and gid were read from the kernel */

struct desk {
	/* the question */
	__s32 fdinfo;          /* the supervisor's descriptor of /proc/TID/fdinfo of the socket's thread; -1: none */
	__s32 fd;              /* the socket's number there */
	__u32 container;
	__u16 port;
	__u8 family;     /* of the requested address; 0: no address in the question */
	__u8 call;
	__u8 addr[16];
	__u32 tid;             /* of the thread whose call it is, for who traces */
	__u32 zero;
	/* the answer */
	__u32 uid;             /* who opened the socket's file: as whom firewalls see it */
	__u32 gid;
	__u64 netns;           /* of the socket */
	__u64 container_netns;
	__u64 endpoint_netns;
	__u32 endpoint;        /* that a rule names; 0: none */
	__u16 local_port;      /* 0: not bound */
	__u8 answered;         /* 0: not a TCP or UDP socket of this container */
	__u8 home;
	__u8 socket_family;
	__u8 state;            /* TCP_*, include/net/tcp_states.h */
	__u8 bound;            /* 1: it is bound to an endpoint that its container is granted now */
	__u8 verdict;          /* of an egress rule; GRANT where an ingress rule names the address */
	__u8 endpoint_family;
	__u8 bind_default;
	__u8 connect_default;
	__u8 next_home;        /* not an answer: set before socket(), and NONE again once that socket has its tag */
	__u16 protocol;        /* IPPROTO_TCP, IPPROTO_MPTCP or IPPROTO_UDP */
	__u16 endpoint_flags;
	/* the part of the answer about the descriptor */
	__u32 references;      /* to the socket's file: more than expected means a dup or a fork */
	__u32 flags;           /* open flags, O_CLOEXEC among them */
	__u32 probed;
	struct options options;
};

/* `relays`: container -> where Graft listens inside its namespace for connections that it relays to the host. */
struct relay {
	__u16 port;      /* on 127.0.0.1, and on ::1 where six is set */
	__u8 six;
	__u8 zero;
	__u16 datagram_port; /* in 127.0.0.0/8 (exchange.bpf.c); 0: none */
	__u16 zero2;
	__u64 cgroup;    /* the container's: datagrams go to sockets of it, or below it */
	__u32 mark;      /* of datagrams to the relay: a secret, and nothing but a hook sets it */
	__u32 answer_mark; /* of those that it sends: another one, which a program inside may come to know */
};

/* `exchanges`: what Graft relays between a container's datagram socket and a remote end (exchange.bpf.c). */
#define GRAFT_EXCHANGE_SLOT_BITS 12
#define GRAFT_EXCHANGE_SLOTS 4096      /* of a container, for its clients */
#define GRAFT_EXCHANGE_OUT_SLOTS 512   /* for what its sockets begin */
#define GRAFT_EXCHANGE_GENERATIONS 2046 /* from 1 on */
struct exchange_slot {
	__u32 container;
	__u16 slot;
	__u8 out;        /* 1: begun by a socket of the container */
	__u8 zero;
};

struct exchange {
	__u8 addr[16];   /* the remote end */
	__u64 used;      /* when a hook found it last, CLOCK_MONOTONIC in nanoseconds; out only */
	__u64 cookie;    /* of the socket that began it; out only */
	__u16 port;
	__u8 family;
	__u8 zero;
	__u16 generation;
	__u16 local_port; /* of the container's socket; in only. 0: its client is forgotten */
};

/* `exchange_clients`: a client of a container's socket at `local_port` -> its exchange's address, in host order. */
struct exchange_client {
	__u32 container;
	__u16 local_port;
	__u16 port;
	__u8 addr[4];
};

/* `stand_ins`: a port of graftd's at ::1 in a container's namespace -> the remote end that it stands for
 * (stand_in.bpf.c). */
struct stand_in_key {
	__u32 container;
	__u16 port;
	__u8 zero[2];
};

struct stand_in {
	__u8 addr[16];
	__u64 cookie;    /* of the socket that took it; 0: graftd gave it to a client, or has forgotten it */
	__u64 begun;     /* when it took it, CLOCK_MONOTONIC in nanoseconds */
	__u64 connected; /* when a socket of the container was connected to it last; 0: never */
	__u16 port;
	__u16 local_port; /* of the container's socket; 0: it had none yet, when it was connected, or it is forgotten */
	__u32 zero;
};

/* `stand_in_ports`: a remote end of a container's socket -> the port of the stand-in for it. */
struct stand_in_place {
	__u8 addr[16];
	__u64 cookie;
	__u32 container;
	__u16 port;
	__u16 local_port; /* of a server that has a client there; 0 where there is a cookie */
};

/* `offers`: container -> the stand-ins that a hook may take, those of them that stand for nothing. */
#define GRAFT_MAX_OFFERED 128
struct offer {
	__u32 count; /* a power of two; 0: none */
	__u16 ports[GRAFT_MAX_OFFERED];
};

/* `ferries`: container -> the sockets on the host's loopback that relay datagrams to and from its own namespace. */
#define GRAFT_BERTHS4 256
#define GRAFT_BERTHS6 16
#define GRAFT_FERRY_NET 0x7ffe0000 /* 127.254.0.0/16; a place is the lower half */
struct ferry {
	__u32 mark;      /* of datagrams to it: a secret, and nothing but a hook sets it */
	__u16 port;      /* at 127.254.0.0/16; 0: none */
	__u16 zero;
	__u16 ports6[GRAFT_BERTHS6]; /* at ::1; 0: none */
};

/* `berths`: which address of a ferry's -> the address inside that it stands for. A place has an address of 127.254.0.0/16,
 * or one of ports6. */
struct berth_key {
	__u32 container;
	__u16 place;
	__u8 family;
	__u8 zero;
};

struct berth {
	__u8 addr[16];
	__u16 port;
	__u8 family;
	__u8 zero[5];
	__u64 used;      /* when the hook last sent there, CLOCK_MONOTONIC in nanoseconds */
};

/* Which socket a crossing is stored with, and so what its address is. */
#define GRAFT_CROSSING_DIALING 1    /* a relay's, connecting to a container's listener: the client it relays */
#define GRAFT_CROSSING_ACCEPTED 2   /* a container's, accepted from a relay: its client */
#define GRAFT_CROSSING_REDIRECTED 3 /* a container's, redirected to the relay: the requested destination */
#define GRAFT_CROSSING_RELAYED 4    /* a relay's, accepted from a container: the requested destination */
#define GRAFT_CROSSING_LISTENER 5   /* a relay's, listening for a container's redirected connections: no address */

/* `crossings`: socket storage, the remote end of a relayed connection. `former_crossings`: the one before, of a datagram
 * socket that was connected anew. */
struct crossing {
	__u8 addr[16];
	__u16 port;
	__u8 family;
	__u8 role;
	__u32 container;
	__u32 uid;       /* REDIRECTED, RELAYED: whose program connects */
	__u32 gid;
	__u32 near;      /* REDIRECTED, UDP: where the socket is connected to then, an address of IPv4's; 0: ::1 */
	__u16 near_port; /* 0: TCP */
	__u16 zero;
};

/* `arrivals`: connections being set up between a relay and a container, by their addresses: the connecting side's, and
 * `to`. An entry exists from the connecting side's first packet until the accepting side has its socket; one of a relay's
 * that connects, until the relay has seen that (its role is ACCEPTED then). */
struct arrival {
	__u64 netns;
	__u8 addr[16];
	__u8 to[16];
	__u16 port;
	__u16 to_port;
	__u8 family;
	__u8 zero[3];
};

/* `flows`: cookie of a flow's source -> its progress (relay.bpf.c). Bytes since the handoff to the kernel. */
struct flow {
	__u64 moved;     /* by the kernel */
	__u64 left;      /* with the source, for graftd to relay */
	__u32 first;     /* the target's write_seq when nothing had been moved */
	__u32 started;
	__u32 mark;      /* how many bytes had come when `segments` was 0 last */
	__u32 segments;  /* that the kernel has moved since */
	__u32 earlier;   /* and before: what is queued is of these two */
	__u32 zero;
};

/* What a hook decided (counter_key.decision). */
#define GRAFT_DECISION_REWRITTEN 0      /* a bind became an endpoint's */
#define GRAFT_DECISION_CONNECTED 1      /* a granted destination */
#define GRAFT_DECISION_REFUSED_BIND 3
#define GRAFT_DECISION_REFUSED_CONNECT 4
#define GRAFT_DECISION_REFUSED_OPTION 5
#define GRAFT_DECISION_CLOSED_LISTENER 6
#define GRAFT_DECISION_DROPPED 7        /* a packet */

/* `counters`: (container, decision) -> how often. */
struct counter_key {
	__u32 container;
	__u32 decision;
};

/* `watches`: of all who watch decisions. Entry 0 is theirs and has `until`, entry 1 the hooks' and has `lost`. */
struct watch {
	__u64 until;     /* somebody does until then, CLOCK_MONOTONIC in nanoseconds */
	__u64 lost;      /* events for which `decisions` had no room */
};

/* What a call asked for (event.call): GRAFT_CALL_BIND, CONNECT and LISTEN, and these. */
#define GRAFT_CALL_SEND 3    /* a datagram by a socket that is not connected */
#define GRAFT_CALL_SOCKET 4  /* refused: of a protocol that no rule can name */
#define GRAFT_CALL_OPTION 5  /* refused: addr has its level and name */
#define GRAFT_CALL_PACKET 6  /* dropped, to or from this address */

/* What became of it (event.outcome). */
#define GRAFT_OUTCOME_REFUSED 0
#define GRAFT_OUTCOME_GRANTED 1   /* by a rule, with its endpoint */
#define GRAFT_OUTCOME_RELAYED 2   /* to graftd */
#define GRAFT_OUTCOME_CONTAINER 3 /* left to the container's own stack */
#define GRAFT_OUTCOME_PASSED 4    /* on the host's stack, by the policy's default */

/* In `decisions`. */
struct event {
	__u64 time;      /* CLOCK_MONOTONIC in nanoseconds */
	__u32 container;
	__u32 tid;       /* 0: not known */
	__u32 pid;       /* of its process; 0: not known */
	__u32 endpoint;  /* 0: none */
	char comm[16];
	__u8 addr[16];   /* that was asked for */
	__u16 port;
	__u16 endpoint_port; /* of a bind; 0: the kernel picks */
	__u8 family;     /* 0: no address */
	__u8 protocol;
	__u8 call;
	__u8 outcome;
};

/* `settings`: one entry. */
struct settings {
	__u32 version;   /* of these layouts: a controller of another version refuses the pins */
	__u32 last_id;   /* last id assigned, for endpoints, containers and rulesets */
	__u8 hooks[16];  /* which text the programs in force were compiled from (graft/datapath/renewal.py) */
};
#define GRAFT_LAYOUT_VERSION 20

#endif
