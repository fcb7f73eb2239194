/* Listens, and has the listener where /proc/PID/fd does not show it.
 *
 *   hiding thread ADDRESS PORT     in the table of descriptors of a thread that has one of its own
 *   hiding leader ADDRESS PORT     in that of a process whose first thread has ended
 *   hiding message ADDRESS PORT    in none: in a message that is on its way through a unix socket
 *
 * Prints "listening", then waits for a line; then takes the listener back and prints whether it still listens.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *way;
static int listener, hidden[2];
static pthread_barrier_t is_hidden;

static void need(int condition, const char *what)
{
	if (!condition) {
		perror(what);
		exit(1);
	}
}

/* Sends (give >= 0) or takes a descriptor by way of the unix socket. */
static int pass(int give)
{
	char byte = 0, room[CMSG_SPACE(sizeof(int))] = {};
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	struct cmsghdr *about = CMSG_FIRSTHDR(&message);
	int fd;

	if (give < 0) {
		need(recvmsg(hidden[1], &message, 0) == 1, "recvmsg");
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
		return fd;
	}
	about->cmsg_level = SOL_SOCKET;
	about->cmsg_type = SCM_RIGHTS;
	about->cmsg_len = CMSG_LEN(sizeof(give));
	memcpy(CMSG_DATA(about), &give, sizeof(give));
	need(sendmsg(hidden[0], &message, 0) == 1, "sendmsg");
	return close(give);
}

/* Whether anybody can still come: a listener that was ended answers EINVAL at once. */
static void tell(void)
{
	char line[16];

	puts("listening");
	need(read(0, line, sizeof(line)) > 0, "read");
	if (!strcmp(way, "message"))
		listener = pass(-1);
	puts(accept4(listener, NULL, NULL, SOCK_NONBLOCK) < 0 && errno == EAGAIN ? "still listens" : "ended");
	pause();
}

static void *run(void *unused)
{
	need(!strcmp(way, "leader") || !unshare(CLONE_FILES), "unshare");
	pthread_barrier_wait(&is_hidden); /* now the other one closes its own */
	pthread_barrier_wait(&is_hidden);
	tell();
	return unused;
}

int main(int count, char **words)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	pthread_t other;

	need(count == 4, "usage");
	way = words[1];
	need(inet_pton(AF_INET, words[2], &address.sin_addr) == 1, words[2]);
	address.sin_port = htons(atoi(words[3]));
	setvbuf(stdout, NULL, _IOLBF, 0);
	listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	need(!bind(listener, (struct sockaddr *)&address, sizeof(address)), "bind");
	need(!listen(listener, 16), "listen");
	if (!strcmp(way, "message")) {
		need(!socketpair(AF_UNIX, SOCK_DGRAM, 0, hidden), "socketpair");
		pass(listener);
		tell();
	}
	pthread_barrier_init(&is_hidden, NULL, 2);
	need(!pthread_create(&other, NULL, run, NULL), "pthread_create");
	pthread_barrier_wait(&is_hidden);
	if (!strcmp(way, "thread"))
		close(listener);
	pthread_barrier_wait(&is_hidden);
	if (!strcmp(way, "leader"))
		syscall(SYS_exit, 0);
	pthread_join(other, NULL);
	return 0;
}
