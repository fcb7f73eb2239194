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
 *   make32 F T P        the same by int 0x80
 *   chown U G           fchown of the socket; -1 leaves one of them as it is
 *   unspec, shutdown    connect(AF_UNSPEC), shutdown(SHUT_RDWR)
 *   accept              a connection is accepted and is the current socket
 *   connect A%IF P      a link-local destination
 *   range LOW HIGH      IP_LOCAL_PORT_RANGE; `range - -`: of the one port that a line on standard input names
 *   fill                TCP_MD5SIG keys until the socket has no memory left for anything
 *   bytes LEVEL NAME H  setsockopt of bytes in hexadecimal
 *   bytes32 LEVEL NAME H the same by int 0x80
 *   hide, unhide        the socket waits in the queue of a unix socket, and comes back
 *   content H           what datagrams have from here on, in hexadecimal
 *   send A P            sendto of a datagram; `send - -` to the peer
 *   cmsg LEVEL TYPE H A P  the same with a control message
 *   fastopen A P        MSG_FASTOPEN with data; `cookieless` sets TCP_FASTOPEN_NO_COOKIE before
 *   much                eight MiB on a connection, or as much of it as goes without waiting for more than a second
 *   receive             what comes within a second; `receive none` where nothing does
 *
 * The io_uring calls need a kernel with them (connect 5.5, bind and listen 6.11).
 */
#define _GNU_SOURCE
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>

#include "calling.h"

#define BACKLOG 8

static struct address *to;
static struct iovec content = { "hello", 5 };
static int fd = -1;

static void say(const char *what, long result)
{
	printf("%s %s\n", what, result < 0 ? strerrorname_np(-result) : "ok");
	fflush(stdout);
}

static void show(const char *what, int (*get)(int, struct sockaddr *, socklen_t *))
{
	struct sockaddr_storage found = {};
	socklen_t size = sizeof(found);
	char text[64] = "";

	if (get(fd, (void *)&found, &size)) {
		say(what, -errno);
		return;
	}
	if (found.ss_family == AF_INET6)
		inet_ntop(AF_INET6, &((struct sockaddr_in6 *)&found)->sin6_addr, text, sizeof(text));
	else
		inet_ntop(AF_INET, &((struct sockaddr_in *)&found)->sin_addr, text, sizeof(text));
	printf("%s %s %d\n", what, text, ntohs(((struct sockaddr_in *)&found)->sin_port));
	fflush(stdout);
}

static void own_namespace(void)
{
	struct ifreq lo = { .ifr_name = "lo" };
	int control;

	if (unshare(CLONE_NEWNET)) {
		say("netns", -errno);
		return;
	}
	control = socket(AF_INET, SOCK_DGRAM, 0);
	lo.ifr_flags = IFF_UP;
	say("netns", result_of(ioctl(control, SIOCSIFFLAGS, &lo))); /* EPERM without CAP_NET_ADMIN: lo stays down */
	close(control);
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
	struct iovec data = content;
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };
	struct cmsghdr *header;

	if (strcmp(host, "-")) {
		parse_address(to, host, port);
		message.msg_name = &to->storage;
		message.msg_namelen = to->length;
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
	say(what, result_of(sendmsg(fd, &message, flags | MSG_NOSIGNAL)));
}

/* The socket goes into the queue of a unix socket, or comes out of it again. */
static long hide_or_find(int hide)
{
	static int pair[2];
	char byte = 0;
	long result;

	if (!hide) {
		fd = receive_fd(pair[1], &byte, 1);
		return fd < 0 ? -errno : 0;
	}
	socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
	result = send_fd(pair[0], fd, &byte, 1);
	if (result < 0)
		return result;
	close(fd);
	fd = -1;
	return 0;
}

static void send_much(void)
{
	struct pollfd one = { .fd = fd, .events = POLLOUT };
	static char data[1 << 18];

	for (size_t left = 8 << 20; left > 0 && poll(&one, 1, 1000) == 1;) {
		ssize_t sent = send(fd, data, left < sizeof(data) ? left : sizeof(data), MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent < 0 && errno != EAGAIN)
			break;
		left -= sent < 0 ? 0 : sent;
	}
	say("much", 0);
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
		say("make", result_of(fd));
		return 4;
	}
	if (!strcmp(*word, "make32")) {
		long made = socket_by_int80(atoi(word[1]), atoi(word[2]), atoi(word[3]));

		fd = made < 0 ? -1 : made;
		say("make32", made);
		return 4;
	}
	if (!strcmp(*word, "chown")) {
		say(*word, result_of(fchown(fd, atoi(word[1]), atoi(word[2]))));
		return 3;
	}
	if (!strcmp(*word, "unspec")) {
		say(*word, result_of(connect(fd, &unspec, sizeof(unspec))));
		return 1;
	}
	if (!strcmp(*word, "shutdown")) {
		say(*word, result_of(shutdown(fd, SHUT_RDWR)));
		return 1;
	}
	if (!strcmp(*word, "accept")) {
		fd = accept(fd, 0, 0);
		say("accept", result_of(fd));
		return 1;
	}
	if (!strcmp(*word, "range")) {
		unsigned both = atoi(word[2]) << 16 | atoi(word[1]);
		char line[16] = "";

		if (!strcmp(word[1], "-") && fgets(line, sizeof(line), stdin))
			both = atoi(line) << 16 | atoi(line);
		memcpy(to, &both, sizeof(both));
		say(*word, option_by_int80(fd, IPPROTO_IP, 51, to, sizeof(both)));
		return 3;
	}
	if (!strcmp(*word, "fill")) {
		fill();
		return 1;
	}
	if (!strcmp(*word, "bytes")) {
		size = parse_hex(word[3], bytes, sizeof(bytes));
		say(*word, result_of(setsockopt(fd, atoi(word[1]), atoi(word[2]), bytes, size)));
		return 4;
	}
	if (!strcmp(*word, "bytes32")) {
		size = parse_hex(word[3], (void *)to, sizeof(*to));
		say(*word, option_by_int80(fd, atoi(word[1]), atoi(word[2]), to, size));
		return 4;
	}
	if (!strcmp(*word, "hide") || !strcmp(*word, "unhide")) {
		say(*word, hide_or_find(!strcmp(*word, "hide")));
		return 1;
	}
	if (!strcmp(*word, "content")) {
		content.iov_base = malloc(sizeof(bytes));
		content.iov_len = parse_hex(word[1], content.iov_base, sizeof(bytes));
		return 2;
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

		say(*word, result_of(setsockopt(fd, IPPROTO_TCP, 34, &one, sizeof(one))));
		return 1;
	}
	if (!strcmp(*word, "fastopen")) {
		send_one(*word, word[1], word[2], MSG_FASTOPEN, 0, 0, 0, 0);
		return 3;
	}
	if (!strcmp(*word, "much")) {
		send_much();
		return 1;
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

	to = low_page();
	for (char **word = argv + 1; word < argv + argc; word++) {
		took = hostile(word);
		if (took) {
			word += took - 1;
		} else if (!strcmp(*word, "socket")) {
			fd = socket(atoi(*++word) == 6 ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
		} else if (!strcmp(*word, "option")) {
			say(*word, result_of(setsockopt(fd, atoi(word[1]), atoi(word[2]), &one, sizeof(one))));
			word += 2;
		} else if (!strcmp(*word, "text")) {
			say(*word, result_of(setsockopt(fd, atoi(word[1]), atoi(word[2]), word[3], strlen(word[3]))));
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
				parse_address(to, word[1], word[2]);
				word += 2;
			}
			if (is(label, names[call], "32"))
				say(label, by_int80(call, fd, to, BACKLOG));
			else if (is(label, names[call], "u"))
				say(label, by_io_uring(call, fd, to, BACKLOG, 0));
			else
				say(label, plainly(call, fd, to, BACKLOG));
		}
	}
	return 0;
}
