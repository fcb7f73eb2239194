/* One thread makes calls with a sockaddr that another thread flips between two addresses all the time.
 *
 *   flip bind|rebind|connect COUNT GOOD PORT BAD PORT
 *
 * bind:    a new socket each time, bound with the flipping address, made to listen and kept open.
 * rebind:  the same, after a connect to 10.98.0.2:9 that takes the socket to where a rule sends it.
 * connect: a new socket each time, connected with the flipping address, then closed.
 * Prints how many calls succeeded, were refused with EACCES, and failed otherwise; then waits for a line.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in both[2];
static struct sockaddr_in shared;
static volatile int done;

static void *flip(void *unused)
{
	unsigned seed = 1;

	for (int turn = 0; !done; turn ^= 1) {
		seed = seed * 1103515245 + 12345;
		/* Address and port in one write of eight bytes: what is read is always one of the two. */
		__atomic_store_n((unsigned long *)&shared, *(unsigned long *)&both[turn], __ATOMIC_SEQ_CST);
		for (volatile unsigned pause = seed >> 16 & 0x3fff; pause; pause--)
			;
	}
	return unused;
}

static void fail(const char *what, int *failed)
{
	if (!(*failed)++)
		perror(what);
}

int main(int argc, char **argv)
{
	int count, one = 1, succeeded = 0, refused = 0, failed = 0;
	int keeps = strcmp(argv[1], "connect");
	struct sockaddr_in closed = { .sin_family = AF_INET, .sin_port = htons(9) };
	pthread_t thread;
	char line[16];

	if (argc != 7)
		return 2;
	inet_pton(AF_INET, "10.98.0.2", &closed.sin_addr);
	for (int i = 0; i < 2; i++) {
		both[i].sin_family = AF_INET;
		inet_pton(AF_INET, argv[3 + 2 * i], &both[i].sin_addr);
		both[i].sin_port = htons(atoi(argv[4 + 2 * i]));
	}
	shared = both[0];
	pthread_create(&thread, 0, flip, 0);
	for (count = atoi(argv[2]); count; count--) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		int result;

		setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one));
		if (!strcmp(argv[1], "rebind") && !connect(fd, (void *)&closed, sizeof(closed)))
			return 3;
		result = keeps ? bind(fd, (void *)&shared, sizeof(shared)) : connect(fd, (void *)&shared, sizeof(shared));
		if (!result) {
			succeeded++;
			if (keeps && listen(fd, 1))
				fail("listen", &failed);
		} else if (errno == EACCES) {
			refused++;
		} else {
			fail(argv[1], &failed);
		}
		if (result || !keeps)
			close(fd);
	}
	done = 1;
	pthread_join(thread, 0);
	printf("succeeded %d refused %d failed %d\n", succeeded, refused, failed);
	fflush(stdout);
	return fgets(line, sizeof(line), stdin) ? 0 : 1;
}
