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
 * The io_uring calls need a kernel with them (connect 5.5, bind and listen 6.11).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <net/if.h>
#include <netinet/in.h>
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

		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(port));
		inet_pton(AF_INET6, host, &six->sin6_addr);
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

static int is(const char *word, const char *name, const char *suffix)
{
	size_t size = strlen(name);

	return !strncmp(word, name, size) && !strcmp(word + size, suffix);
}

int main(int argc, char **argv)
{
	static const char *const names[] = { "bind", "connect", "listen" };
	int call, one = 1;
	char line[64];

	address = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	for (char **word = argv + 1; word < argv + argc; word++) {
		if (!strcmp(*word, "socket")) {
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
