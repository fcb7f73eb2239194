/* Socket calls in ways that not every filter or hook sees: as a 32-bit caller, by io_uring; and what goes with them.
 * Where a call fails, all of them give its errno, negative.
 */
#ifndef CALLING_H
#define CALLING_H

#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MAP_32BIT /* x86 only, as int 0x80 is */
#define MAP_32BIT 0
#endif

enum { BIND, CONNECT, LISTEN };

/* Has to lie below 4 GiB, for int 0x80. */
struct address {
	struct sockaddr_storage storage;
	socklen_t length;
};

/* A page below 4 GiB. */
static inline void *low_page(void)
{
	return mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
}

static inline long result_of(long result)
{
	return result < 0 ? -errno : result;
}

/* `host` may end in %INTERFACE, a name or a number. */
static inline void parse_address(struct address *to, const char *host, const char *port)
{
	char copy[96], *interface;

	memset(to, 0, sizeof(*to));
	snprintf(copy, sizeof(copy), "%s", host);
	interface = strchr(copy, '%');
	if (interface)
		*interface++ = 0;
	if (strchr(copy, ':')) {
		struct sockaddr_in6 *six = (void *)&to->storage;

		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(port));
		six->sin6_scope_id = interface ? if_nametoindex(interface) ?: atoi(interface) : 0;
		inet_pton(AF_INET6, copy, &six->sin6_addr);
		to->length = sizeof(*six);
	} else {
		struct sockaddr_in *four = (void *)&to->storage;

		four->sin_family = AF_INET;
		four->sin_port = htons(atoi(port));
		inet_pton(AF_INET, copy, &four->sin_addr);
		to->length = sizeof(*four);
	}
}

/* How many bytes a text in hexadecimal has become. */
static inline size_t parse_hex(const char *text, unsigned char *bytes, size_t most)
{
	size_t size = 0;

	for (; text[0] && text[1] && size < most; text += 2)
		sscanf(text, "%2hhx", &bytes[size++]);
	return size;
}

static inline long plainly(int call, int fd, struct address *to, int backlog)
{
	if (call == BIND)
		return result_of(bind(fd, (void *)&to->storage, to->length));
	return result_of(call == CONNECT ? connect(fd, (void *)&to->storage, to->length) : listen(fd, backlog));
}

#ifdef __x86_64__
/* Numbers of arch/x86/entry/syscalls/syscall_32.tbl. */
static inline long by_int80(int call, int fd, struct address *to, int backlog)
{
	static const long numbers[] = { 361, 362, 363 };
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(numbers[call]), "b"((long)fd), "c"(call == LISTEN ? backlog : (long)&to->storage),
		       "d"((long)to->length)
		     : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}

static inline long socket_by_int80(int family, int type, int protocol)
{
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(359L), "b"((long)family), "c"((long)type), "d"((long)protocol)
		     : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}

/* setsockopt of a value below 4 GiB. */
static inline long option_by_int80(int fd, int level, int name, void *value, size_t size)
{
	register long fifth asm("rdi") = size;
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(366L), "b"((long)fd), "c"((long)level), "d"((long)name), "S"((long)value), "r"(fifth)
		     : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}
#else
static inline long by_int80(int call, int fd, struct address *to, int backlog)
{
	(void)call, (void)fd, (void)to, (void)backlog;
	return -ENOSYS;
}

static inline long socket_by_int80(int family, int type, int protocol)
{
	(void)family, (void)type, (void)protocol;
	return -ENOSYS;
}

static inline long option_by_int80(int fd, int level, int name, void *value, size_t size)
{
	(void)fd, (void)level, (void)name, (void)value, (void)size;
	return -ENOSYS;
}
#endif

/* Waits at most so many nanoseconds, and gives EINPROGRESS then; 0: as long as it takes. (io_uring waits whatever the
 * descriptor's O_NONBLOCK says.) */
static inline long by_io_uring(int call, int fd, struct address *to, int backlog, long most)
{
	struct io_uring_params p = {};
	struct __kernel_timespec limit = { .tv_nsec = most };
	struct io_uring_getevents_arg wait = { .ts = most ? (unsigned long)&limit : 0 };
	int ring = syscall(__NR_io_uring_setup, 2, &p);
	char *sq, *cq;
	struct io_uring_sqe *sqe;
	size_t sq_size, cq_size;
	long result;

	if (ring < 0)
		return -errno;
	sq_size = p.sq_off.array + 4 * p.sq_entries;
	cq_size = p.cq_off.cqes + sizeof(struct io_uring_cqe) * p.cq_entries;
	sq = mmap(0, sq_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	cq = mmap(0, cq_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	sqe = mmap(0, p.sq_entries * sizeof(*sqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	memset(sqe, 0, sizeof(*sqe));
	sqe->fd = fd;
	sqe->opcode = call == CONNECT ? IORING_OP_CONNECT : call == BIND ? 56 : 57; /* IORING_OP_BIND, _LISTEN: 6.11 */
	if (call == LISTEN) {
		sqe->len = backlog;
	} else {
		sqe->addr = (unsigned long)&to->storage;
		sqe->off = to->length; /* addr2 */
	}
	*(unsigned *)(sq + p.sq_off.array) = 0;
	__atomic_store_n((unsigned *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	result = syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &wait, sizeof(wait));
	if (result < 0)
		result = -errno;
	else if (__atomic_load_n((unsigned *)(cq + p.cq_off.tail), __ATOMIC_ACQUIRE))
		result = ((struct io_uring_cqe *)(cq + p.cq_off.cqes))->res;
	else
		result = -EINPROGRESS;
	munmap(sq, sq_size);
	munmap(cq, cq_size);
	munmap(sqe, p.sq_entries * sizeof(*sqe));
	close(ring);
	return result;
}

/* A descriptor, with some bytes, over a unix socket. */
static inline long send_fd(int through, int fd, const void *text, size_t size)
{
	char space[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = {};
	struct iovec data = { (void *)text, size };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	return result_of(sendmsg(through, &message, 0));
}

/* The descriptor that comes; -1 where none does. */
static inline int receive_fd(int through, void *text, size_t size)
{
	char space[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
	struct iovec data = { text, size };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space) };
	struct cmsghdr *header;
	int fd = -1;

	if (recvmsg(through, &message, 0) <= 0)
		return -1;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(header), sizeof(int));
	return fd;
}

#endif
