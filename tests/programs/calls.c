/* Makes the calls that its arguments name, one after the other on one socket, and prints what came of each.
 *
 *   socket 4|6          a new TCP socket, the current one from here on
 *   bind|connect A P    and the same as bind32, connect32 (int 0x80) and bindu, connectu (io_uring)
 *   listen              and listen32, listenu
 *   option LEVEL NAME   setsockopt of an int 1; `text LEVEL NAME VALUE` of a text
 *   name, peer, home    getsockname, getpeername, the cookie of the socket's namespace
 *   netns               enters a network namespace of its own, with lo up
 *   wait                until a line comes on standard input
 *
 * and what a program does that wants more than it may:
 *
 *   make F T P          a socket of that family, type and protocol (numbers), the current one
 *   unspec, shutdown    connect(AF_UNSPEC), shutdown(SHUT_RDWR)
 *   accept              a connection is accepted and is the current socket
 *   connect A%IF P      a link-local destination
 *   range LOW HIGH      IP_LOCAL_PORT_RANGE; `range - -`: of the one port that a line on standard input names
 *   fill                TCP_MD5SIG keys until the socket has no memory left for anything
 *   bytes LEVEL NAME H  setsockopt of bytes in hexadecimal
 *   bytes32 LEVEL NAME H the same by int 0x80
 *   hide, unhide        the socket waits in the queue of a unix socket, and comes back
 *   send A P            sendto of a datagram; `send - -` to the peer
 *   cmsg LEVEL TYPE H A P  the same with a control message
 *   fastopen A P        MSG_FASTOPEN with data; `cookieless` sets TCP_FASTOPEN_NO_COOKIE before
 *   receive             what comes within a second; `receive none` where nothing does
 *
 * The io_uring calls need a kernel with them (connect 5.5, bind and listen 6.11).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MAP_32BIT /* x86 only, as int 0x80 is */
#define MAP_32BIT 0
#endif

enum { BIND, CONNECT, LISTEN };

static struct sockaddr_storage *address; /* below 4 GiB, for int 0x80 */
static socklen_t length;
static int fd = -1;

static void say(const char *what, long result)
{
	if (result < 0)
		printf("%s %s\n", what, strerrorname_np(result == -1 ? errno : (int)-result));
	else
		printf("%s ok\n", what);
	fflush(stdout);
}

static void parse(const char *host, const char *port)
{
	memset(address, 0, sizeof(*address));
	if (strchr(host, ':')) {
		struct sockaddr_in6 *six = (void *)address;
		char *copy = strdup(host), *interface = strchr(copy, '%');

		if (interface) {
			*interface++ = 0;
			six->sin6_scope_id = if_nametoindex(interface) ?: atoi(interface);
		}
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(port));
		inet_pton(AF_INET6, copy, &six->sin6_addr);
		free(copy);
		length = sizeof(*six);
	} else {
		struct sockaddr_in *four = (void *)address;

		four->sin_family = AF_INET;
		four->sin_port = htons(atoi(port));
		inet_pton(AF_INET, host, &four->sin_addr);
		length = sizeof(*four);
	}
}

static void show(const char *what, int (*get)(int, struct sockaddr *, socklen_t *))
{
	struct sockaddr_storage found = {};
	socklen_t size = sizeof(found);
	char text[64] = "";

	if (get(fd, (void *)&found, &size)) {
		say(what, -1);
		return;
	}
	if (found.ss_family == AF_INET6)
		inet_ntop(AF_INET6, &((struct sockaddr_in6 *)&found)->sin6_addr, text, sizeof(text));
	else
		inet_ntop(AF_INET, &((struct sockaddr_in *)&found)->sin_addr, text, sizeof(text));
	printf("%s %s %d\n", what, text, ntohs(((struct sockaddr_in *)&found)->sin_port));
	fflush(stdout);
}

static long plain(int call)
{
	if (call == BIND)
		return bind(fd, (void *)address, length);
	return call == CONNECT ? connect(fd, (void *)address, length) : listen(fd, 8);
}

#ifdef __x86_64__
/* Numbers of arch/x86/entry/syscalls/syscall_32.tbl. */
static long by_int80(int call)
{
	static const long numbers[] = { 361, 362, 363 };
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(numbers[call]), "b"((long)fd), "c"(call == LISTEN ? 8 : (long)address), "d"((long)length)
		     : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}
#else
static long by_int80(int call)
{
	(void)call;
	return -ENOSYS;
}
#endif

#ifdef __x86_64__
static long option_by_int80(int level, int name, size_t size)
{
	register long fifth asm("rdi") = size;
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(366L), "b"((long)fd), "c"((long)level), "d"((long)name), "S"((long)address), "r"(fifth)
		     : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}
#else
static long option_by_int80(int level, int name, size_t size)
{
	(void)level, (void)name, (void)size;
	return -ENOSYS;
}
#endif

static long by_io_uring(int call)
{
	struct io_uring_params p = {};
	int ring = syscall(__NR_io_uring_setup, 4, &p);
	char *sq, *cq;
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqe;
	unsigned tail;
	long result;

	if (ring < 0)
		return -1;
	sq = mmap(0, p.sq_off.array + 4 * p.sq_entries, 3, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	cq = mmap(0, p.cq_off.cqes + 16 * p.cq_entries, 3, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	sqe = mmap(0, p.sq_entries * sizeof(*sqe), 3, MAP_SHARED, ring, IORING_OFF_SQES);
	memset(sqe, 0, sizeof(*sqe));
	sqe->fd = fd;
	sqe->opcode = call == CONNECT ? IORING_OP_CONNECT : call == BIND ? 56 : 57; /* IORING_OP_BIND, _LISTEN */
	if (call == LISTEN)
		sqe->len = 8;
	else {
		sqe->addr = (unsigned long)address;
		sqe->off = length; /* addr2 */
	}
	tail = *(unsigned *)(sq + p.sq_off.tail);
	((unsigned *)(sq + p.sq_off.array))[tail & *(unsigned *)(sq + p.sq_off.ring_mask)] = 0;
	__atomic_store_n((unsigned *)(sq + p.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) < 0)
		return -1;
	cqe = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
	result = cqe->res;
	close(ring);
	return result;
}

static void own_namespace(void)
{
	struct ifreq lo = { .ifr_name = "lo" };
	int control;

	if (unshare(CLONE_NEWNET)) {
		say("netns", -1);
		return;
	}
	control = socket(AF_INET, SOCK_DGRAM, 0);
	lo.ifr_flags = IFF_UP;
	say("netns", ioctl(control, SIOCSIFFLAGS, &lo)); /* EPERM without CAP_NET_ADMIN: lo stays down */
	close(control);
}

static size_t parse_hex(const char *text, unsigned char *bytes, size_t most)
{
	size_t size = 0;

	for (; text[0] && text[1] && size < most; text += 2)
		sscanf(text, "%2hhx", &bytes[size++]);
	return size;
}

/* Keys of growing number, then smaller and smaller things, until nothing of any size fits any more. */
static void fill(void)
{
	struct tcp_md5sig key = { .tcpm_keylen = 16 };
	struct sockaddr_in *peer = (void *)&key.tcpm_addr;
	int count = 0;

	peer->sin_family = AF_INET;
	for (unsigned i = 1; i < 1000000; i++) {
		peer->sin_addr.s_addr = htonl(0x0a000000 + i);
		if (setsockopt(fd, IPPROTO_TCP, TCP_MD5SIG, &key, sizeof(key)))
			break;
		count++;
	}
	printf("fill %s\n", count ? "ok" : strerrorname_np(errno));
	fflush(stdout);
}

/* One datagram, or the first bytes of a connection, to the address or (`-`) to the peer. */
static void send_one(const char *what, const char *host, const char *port, int flags, const unsigned char *control,
		     size_t size, int level, int type)
{
	char space[512] __attribute__((aligned(8))) = {};
	struct iovec data = { "hello", 5 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };
	struct cmsghdr *header;

	if (strcmp(host, "-")) {
		parse(host, port);
		message.msg_name = address;
		message.msg_namelen = length;
	}
	if (control) {
		message.msg_control = space;
		message.msg_controllen = CMSG_SPACE(size);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = level;
		header->cmsg_type = type;
		header->cmsg_len = CMSG_LEN(size);
		memcpy(CMSG_DATA(header), control, size);
	}
	say(what, sendmsg(fd, &message, flags | MSG_NOSIGNAL));
}

/* The socket goes into the queue of a unix socket, or comes out of it again. */
static long hide_or_find(int hide)
{
	static int pair[2];
	char space[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = {};
	struct iovec data = { "x", 1 };
	char got;
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	if (hide) {
		socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &fd, sizeof(int));
		if (sendmsg(pair[0], &message, 0) < 0)
			return -1;
		close(fd);
		fd = -1;
		return 0;
	}
	data.iov_base = &got;
	if (recvmsg(pair[1], &message, 0) < 0)
		return -1;
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	return 0;
}

static void receive(void)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };
	char data[64];
	ssize_t got = poll(&one, 1, 1000) == 1 ? recv(fd, data, sizeof(data) - 1, MSG_DONTWAIT) : -1;

	data[got < 0 ? 0 : got] = 0;
	printf("receive %s\n", got < 0 ? "none" : data);
	fflush(stdout);
}

/* The steps of a program that wants more than it may. How many words it took, 0: it is none of them. */
static int hostile(char **word)
{
	static const struct sockaddr unspec = { .sa_family = AF_UNSPEC };
	unsigned char bytes[256];
	size_t size;

	if (!strcmp(*word, "make")) {
		fd = socket(atoi(word[1]), atoi(word[2]), atoi(word[3]));
		say("make", fd < 0 ? -1 : 0);
		return 4;
	}
	if (!strcmp(*word, "unspec")) {
		say(*word, connect(fd, &unspec, sizeof(unspec)));
		return 1;
	}
	if (!strcmp(*word, "shutdown")) {
		say(*word, shutdown(fd, SHUT_RDWR));
		return 1;
	}
	if (!strcmp(*word, "accept")) {
		fd = accept(fd, 0, 0);
		say("accept", fd < 0 ? -1 : 0);
		return 1;
	}
	if (!strcmp(*word, "range")) {
		unsigned both = atoi(word[2]) << 16 | atoi(word[1]);
		char line[16] = "";

		if (!strcmp(word[1], "-") && fgets(line, sizeof(line), stdin))
			both = atoi(line) << 16 | atoi(line);

		memcpy(address, &both, sizeof(both));
		say(*word, option_by_int80(IPPROTO_IP, 51, sizeof(both)));
		return 3;
	}
	if (!strcmp(*word, "fill")) {
		fill();
		return 1;
	}
	if (!strcmp(*word, "bytes")) {
		size = parse_hex(word[3], bytes, sizeof(bytes));
		say(*word, setsockopt(fd, atoi(word[1]), atoi(word[2]), bytes, size));
		return 4;
	}
	if (!strcmp(*word, "bytes32")) {
		size = parse_hex(word[3], (void *)address, sizeof(*address));
		say(*word, option_by_int80(atoi(word[1]), atoi(word[2]), size));
		return 4;
	}
	if (!strcmp(*word, "hide") || !strcmp(*word, "unhide")) {
		say(*word, hide_or_find(!strcmp(*word, "hide")));
		return 1;
	}
	if (!strcmp(*word, "send")) {
		send_one(*word, word[1], word[2], 0, 0, 0, 0, 0);
		return 3;
	}
	if (!strcmp(*word, "cmsg")) {
		size = parse_hex(word[3], bytes, sizeof(bytes));
		send_one(*word, word[4], word[5], 0, bytes, size, atoi(word[1]), atoi(word[2]));
		return 6;
	}
	if (!strcmp(*word, "cookieless")) {
		int one = 1;

		say(*word, setsockopt(fd, IPPROTO_TCP, 34, &one, sizeof(one)));
		return 1;
	}
	if (!strcmp(*word, "fastopen")) {
		send_one(*word, word[1], word[2], MSG_FASTOPEN, 0, 0, 0, 0);
		return 3;
	}
	if (!strcmp(*word, "receive")) {
		receive();
		return 1;
	}
	return 0;
}

static int is(const char *word, const char *name, const char *suffix)
{
	size_t size = strlen(name);

	return !strncmp(word, name, size) && !strcmp(word + size, suffix);
}

int main(int argc, char **argv)
{
	static const char *const names[] = { "bind", "connect", "listen" };
	int call, took, one = 1;
	char line[64];

	address = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	for (char **word = argv + 1; word < argv + argc; word++) {
		took = hostile(word);
		if (took) {
			word += took - 1;
		} else if (!strcmp(*word, "socket")) {
			fd = socket(atoi(*++word) == 6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
		} else if (!strcmp(*word, "option")) {
			say(*word, setsockopt(fd, atoi(word[1]), atoi(word[2]), &one, sizeof(one)));
			word += 2;
		} else if (!strcmp(*word, "text")) {
			say(*word, setsockopt(fd, atoi(word[1]), atoi(word[2]), word[3], strlen(word[3])));
			word += 3;
		} else if (!strcmp(*word, "name")) {
			show(*word, getsockname);
		} else if (!strcmp(*word, "peer")) {
			show(*word, getpeername);
		} else if (!strcmp(*word, "home")) {
			unsigned long cookie = 0;
			socklen_t size = sizeof(cookie);

			getsockopt(fd, SOL_SOCKET, 71 /* SO_NETNS_COOKIE */, &cookie, &size);
			printf("home %lu\n", cookie);
			fflush(stdout);
		} else if (!strcmp(*word, "netns")) {
			own_namespace();
		} else if (!strcmp(*word, "wait")) {
			if (!fgets(line, sizeof(line), stdin))
				return 1;
		} else {
			const char *label = *word;

			for (call = BIND; call <= LISTEN && strncmp(label, names[call], strlen(names[call])); call++)
				;
			if (call > LISTEN)
				return 2;
			if (call != LISTEN) {
				parse(word[1], word[2]);
				word += 2;
			}
			if (is(label, names[call], "32"))
				say(label, by_int80(call));
			else if (is(label, names[call], "u"))
				say(label, by_io_uring(call));
			else
				say(label, plain(call));
		}
	}
	return 0;
}
