/* Has the kernel send SIGKILL to a process by way of a socket's SIGIO, when the socket changes its state.
 *
 *   killing WAY PID connect ADDRESS PORT     the signal is sent when the connection is refused
 *   killing WAY PID bind ADDRESS PORT        or when a client connects; prints "listening", and waits for one
 *
 * WAY: process, group or thread (F_SETOWN_EX), ioctl (FIOSETOWN); namespaces: F_SETOWN_EX, and then all the rest in a
 * user and a pid namespace of its own, where WHOM has no number.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <asm/sockios.h>
#include <unistd.h>

static void name_receiver(int fd, const char *way, int receiver)
{
	struct f_owner_ex owner = { .type = F_OWNER_PID, .pid = receiver };

	if (!strcmp(way, "group"))
		owner.type = F_OWNER_PGRP;
	if (!strcmp(way, "thread"))
		owner.type = F_OWNER_TID;
	if (strcmp(way, "ioctl") ? fcntl(fd, F_SETOWN_EX, &owner) : ioctl(fd, FIOSETOWN, &receiver)) {
		perror(way);
		exit(2);
	}
}

/* Returns in a child. */
static void enter_namespaces(void)
{
	int status;
	pid_t child = unshare(CLONE_NEWUSER | CLONE_NEWPID) ? -1 : fork();

	if (child < 0) {
		perror("namespaces");
		exit(2);
	}
	if (child)
		exit(waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	struct pollfd one = { .events = POLLIN };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (argc != 6)
		return 2;
	inet_pton(AF_INET, argv[4], &to.sin_addr);
	to.sin_port = htons(atoi(argv[5]));
	name_receiver(fd, argv[1], atoi(argv[2]));
	if (fcntl(fd, F_SETSIG, SIGKILL) || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_ASYNC)) {
		perror("fcntl");
		return 2;
	}
	if (!strcmp(argv[1], "namespaces"))
		enter_namespaces();
	if (!strcmp(argv[3], "bind")) {
		if (bind(fd, (void *)&to, sizeof(to)) || listen(fd, 8)) {
			perror("bind");
			return 1;
		}
		puts("listening");
		fflush(stdout);
		one.fd = fd;
		printf("poll %d\n", poll(&one, 1, 10000));
		fflush(stdout);
		one.fd = accept(fd, 0, 0); /* or its client would be reset */
		poll(&one, 1, 10000);
	} else {
		int result = connect(fd, (void *)&to, sizeof(to));

		printf("connect %s\n", result ? strerrorname_np(errno) : "ok");
	}
	fflush(stdout);
	return 0;
}
