/* Two threads bind one socket at the same time, again and again, until what the hooks say of it is not what the kernel
 * has done:  binding_twice TYPE PORT SECONDS
 *
 * One binds port 53, which becomes PORT, the other port 0. A socket at PORT that getsockname() shows with that number, and
 * not as 53, has the tag of the other bind. Prints `raced`, and after a line on standard input serves there; else `never`.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static atomic_int round_number, finished;
static int fd;

static void bind_at(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };

	for (volatile int pause = rand() % 400; pause > 0; pause--)
		;
	if (bind(fd, (void *)&address, sizeof(address)))
		return; /* one of the two fails, as it must */
}

static void *other(void *unused)
{
	for (int seen = 0;; seen++) {
		while (round_number == seen)
			sched_yield();
		bind_at(0);
		finished++;
	}
	return unused;
}

static void serve(int type)
{
	char text[64] = "";
	int client;

	if (type == SOCK_STREAM) {
		listen(fd, 8);
		client = accept(fd, 0, 0);
		if (write(client, "served", 6) != 6)
			return;
	} else if (recv(fd, text, sizeof(text) - 1, 0) < 0) {
		return;
	}
	printf("served %s\n", text);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	int type = atoi(argv[1]), want = atoi(argv[2]);
	time_t end = time(0) + atoi(argv[3]);
	struct sockaddr_in name;
	pthread_t thread;
	char line[64];

	pthread_create(&thread, 0, other, 0);
	for (int i = 1; time(0) < end; i++) {
		socklen_t size = sizeof(name);

		fd = socket(AF_INET, type, 0);
		round_number++;
		bind_at(53);
		while (finished < i)
			sched_yield();
		getsockname(fd, (void *)&name, &size);
		if (ntohs(name.sin_port) == want) {
			printf("raced\n");
			fflush(stdout);
			if (fgets(line, sizeof(line), stdin))
				serve(type);
			return 0;
		}
		close(fd);
	}
	printf("never\n");
	fflush(stdout);
	return !fgets(line, sizeof(line), stdin);
}
