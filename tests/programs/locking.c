/* Keeps a socket locked: a system call that has the socket's lock waits for a page of memory, and this program, which gets
 * the page fault from userfaultfd(2), does not deliver the page.
 *
 *   locking listen ADDRESS PORT     a listener: getsockopt(SO_GET_FILTER) writes to the page
 *   locking connect ADDRESS PORT    a connection: send() reads from it
 *   locking udp ADDRESS PORT        a bound socket: send() with MSG_MORE reads from it
 *   locking fastopen ADDRESS PORT   an MPTCP socket that connects: its first packet reads from it
 *   locking call ADDRESS PORT       a connection to a listener of its own there, which it then asks to listen
 *
 * Prints "locked", and after a line of standard input delivers the page and prints what the call returned.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#ifndef TCP_FASTOPEN_NO_COOKIE
#define TCP_FASTOPEN_NO_COOKIE 34
#endif

static const char *how;
static struct sockaddr_in address = { .sin_family = AF_INET };
static char *page;
static int sock, result;

static int is(const char *name)
{
	return !strcmp(how, name);
}

static void need(int condition, const char *what)
{
	if (!condition) {
		perror(what);
		exit(1);
	}
}

/* A missing page, and the descriptor that reports each page fault. */
static int missing_page(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register registered = { .range = { .len = PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	int faults = syscall(SYS_userfaultfd, O_CLOEXEC);

	need(faults >= 0, "userfaultfd");
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	need(page != MAP_FAILED, "mmap");
	registered.range.start = (uintptr_t)page;
	need(!ioctl(faults, UFFDIO_API, &api), "UFFDIO_API");
	need(!ioctl(faults, UFFDIO_REGISTER, &registered), "UFFDIO_REGISTER");
	return faults;
}

static int listener(void)
{
	struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, 0xffffffff);
	struct sock_fprog filter = { .len = 1, .filter = &all };
	int made = socket(AF_INET, SOCK_STREAM, 0);

	if (is("listen"))
		need(!setsockopt(made, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter)), "SO_ATTACH_FILTER");
	need(!bind(made, (struct sockaddr *)&address, sizeof(address)), "bind");
	need(!listen(made, 16), "listen");
	return made;
}

static void prepare(void)
{
	int one = 1;

	if (is("listen")) {
		sock = listener();
		return;
	}
	if (is("call"))
		listener();
	sock = socket(AF_INET, is("udp") ? SOCK_DGRAM : SOCK_STREAM, is("fastopen") ? IPPROTO_MPTCP : 0);
	need(sock >= 0, "socket");
	if (is("udp"))
		need(!bind(sock, (struct sockaddr *)&address, sizeof(address)), "bind");
	else if (is("fastopen"))
		need(!setsockopt(sock, IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, &one, sizeof(one)), "NO_COOKIE");
	else
		need(!connect(sock, (struct sockaddr *)&address, sizeof(address)), "connect");
}

static void *hold(void *unused)
{
	int flags = is("udp") ? MSG_MORE : is("fastopen") ? MSG_FASTOPEN : 0;
	socklen_t length = 1;

	if (is("listen"))
		result = getsockopt(sock, SOL_SOCKET, SO_GET_FILTER, page, &length);
	else if (flags)
		result = sendto(sock, page, 1000, flags, (struct sockaddr *)&address, sizeof(address));
	else
		result = send(sock, page, 1000, 0);
	if (result < 0)
		result = -errno;
	return unused;
}

static void *call(void *unused)
{
	listen(sock, 16);
	return unused;
}

int main(int count, char **words)
{
	struct uffdio_zeropage deliver = { .range = { .len = PAGE } };
	struct uffd_msg fault;
	pthread_t holder, caller;
	char line[16];
	int faults;

	need(count == 4, "usage");
	how = words[1];
	need(inet_pton(AF_INET, words[2], &address.sin_addr) == 1, words[2]);
	address.sin_port = htons(atoi(words[3]));
	setvbuf(stdout, NULL, _IOLBF, 0);
	faults = missing_page();
	prepare();
	need(!pthread_create(&holder, NULL, hold, NULL), "pthread_create");
	need(read(faults, &fault, sizeof(fault)) == sizeof(fault), "userfaultfd");
	if (is("call"))
		need(!pthread_create(&caller, NULL, call, NULL), "pthread_create");
	puts("locked");
	need(read(0, line, sizeof(line)) >= 0, "read");
	deliver.range.start = (uintptr_t)page;
	need(!ioctl(faults, UFFDIO_ZEROPAGE, &deliver), "UFFDIO_ZEROPAGE");
	pthread_join(holder, NULL);
	printf("released, %d\n", result);
	pause();
	return 0;
}
