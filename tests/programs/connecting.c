/* Many threads that connect, blocking or not, each many times; a connection is one byte sent and one received.
 *
 *   connecting THREADS TIMES blocking|nonblocking ADDR PORT       prints how many came through
 *
 * Without blocking, the socket is registered with epoll before it connects, and epoll tells when it has.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in to;
static int times, blocking, through;

static int connected(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | (blocking ? 0 : SOCK_NONBLOCK), 0);
	int epoll = epoll_create1(EPOLL_CLOEXEC), error = 0;
	struct epoll_event event = { .events = EPOLLOUT, .data.u64 = 7 };
	socklen_t size = sizeof(error);
	char byte = 'x';

	if (!blocking)
		epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	if (connect(fd, (void *)&to, sizeof(to))) {
		if (blocking || errno != EINPROGRESS)
			goto out;
	}
	if (!blocking) {
		if (epoll_wait(epoll, &event, 1, 5000) != 1 || event.data.u64 != 7)
			goto out;
		getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
		event.events = EPOLLIN;
		if (error || write(fd, &byte, 1) != 1 || epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event) ||
		    epoll_wait(epoll, &event, 1, 5000) != 1 || read(fd, &byte, 1) != 1)
			goto out;
		close(fd);
		close(epoll);
		return 1;
	}
	if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
		goto out;
	close(fd);
	close(epoll);
	return 1;
out:
	perror("connecting");
	close(fd);
	close(epoll);
	return 0;
}

static void *run(void *unused)
{
	for (int i = 0; i < times; i++)
		__atomic_add_fetch(&through, connected(), __ATOMIC_RELAXED);
	return unused;
}

int main(int argc, char **argv)
{
	int threads = atoi(argv[1]);
	pthread_t thread[64];

	if (argc != 6)
		return 2;
	times = atoi(argv[2]);
	blocking = !strcmp(argv[3], "blocking");
	to.sin_family = AF_INET;
	inet_pton(AF_INET, argv[4], &to.sin_addr);
	to.sin_port = htons(atoi(argv[5]));
	for (int i = 0; i < threads; i++)
		pthread_create(&thread[i], 0, run, 0);
	for (int i = 0; i < threads; i++)
		pthread_join(thread[i], 0);
	printf("%d\n", through);
	return 0;
}
