/* One thread connects a descriptor's number all the time, another one puts other files there.
 *
 *   renumbering SECONDS ADDRESS PORT
 *
 * Most of them are fresh TCP sockets, some a UDP socket, a pipe's end or nothing. Prints how many connects succeeded.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NUMBER 100

static volatile int done;

static void *renumber(void *unused)
{
	unsigned seed = 1;
	int ends[2];

	if (pipe(ends))
		exit(1);
	while (!done) {
		int kind, made;

		seed = seed * 1103515245 + 12345;
		kind = seed >> 16 & 15;
		made = socket(AF_INET, kind == 0 ? SOCK_DGRAM : SOCK_STREAM | (kind & 1 ? SOCK_NONBLOCK : 0), 0);
		dup2(kind == 1 ? ends[0] : made, NUMBER);
		close(made);
		if (kind == 2)
			close(NUMBER);
		for (volatile unsigned pause = seed >> 8 & 0x7fff; pause; pause--)
			;
	}
	return unused;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	pthread_t thread;
	int connected = 0;

	if (argc != 4 || inet_pton(AF_INET, argv[2], &to.sin_addr) != 1)
		return 2;
	to.sin_port = htons(atoi(argv[3]));
	if (pthread_create(&thread, NULL, renumber, NULL))
		return 1;
	for (time_t end = time(NULL) + atoi(argv[1]); time(NULL) < end;)
		connected += !connect(NUMBER, (struct sockaddr *)&to, sizeof(to));
	done = 1;
	pthread_join(thread, NULL);
	printf("%d\n", connected);
	return 0;
}
