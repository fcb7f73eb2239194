/* A listener with all that can refer to a descriptor before its bind: a dup'ed copy, an epoll registration
 * of each, and another thread that waits in epoll_wait already. The copy is what listens and accepts.
 *
 *   hanging PORT          prints `accepted DATA` for each connection, DATA being what epoll was given
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int epoll, copy;

static void *serve(void *unused)
{
	struct epoll_event event;

	while (epoll_wait(epoll, &event, 1, -1) == 1) {
		int peer = accept4(copy, 0, 0, SOCK_NONBLOCK);

		if (peer < 0)
			continue;
		printf("accepted %llx\n", (unsigned long long)event.data.u64);
		fflush(stdout);
		close(peer);
	}
	return unused;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 0x1234567890abcdef };
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	pthread_t thread;

	if (argc != 2)
		return 2;
	to.sin_port = htons(atoi(argv[1]));
	epoll = epoll_create1(EPOLL_CLOEXEC);
	copy = dup(listener);
	epoll_ctl(epoll, EPOLL_CTL_ADD, copy, &event);
	pthread_create(&thread, 0, serve, 0);
	if (bind(listener, (void *)&to, sizeof(to)) || listen(copy, 8)) {
		perror("hanging");
		return 1;
	}
	/* The program changes the registration by its own number, as it may. */
	if (epoll_ctl(epoll, EPOLL_CTL_MOD, copy, &event)) {
		perror("epoll");
		return 1;
	}
	close(listener);
	puts("ready");
	fflush(stdout);
	pthread_join(thread, 0);
	return 0;
}
