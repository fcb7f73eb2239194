/* A set-user-id program that waits with an epoll instance of its own. */
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

int main(void)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC), got;
	struct epoll_event event = {};

	got = epoll_wait(epoll, &event, 1, 1500);
	printf("euid %d epoll %d: %d events, data %llx\n", geteuid(), epoll, got, (unsigned long long)event.data.u64);
	return 0;
}
