/* A container's own client: it connects to where it may, and tries where it may not, until its parent ends.
 *
 *   worker ALLOWED_ADDRESS ALLOWED_PORT FORBIDDEN_ADDRESS FORBIDDEN_PORT ...
 *
 * Lines: `count REQUESTS FORBIDDEN_TRIED`, `failed BEGUN ENDED WHAT` (seconds of CLOCK_MONOTONIC), `forbidden WHAT`.
 * Static, so that it runs in any root file system.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { WAIT_SECONDS = 10, NAP_US = 200000, FORBIDDEN_EVERY = 5, COUNT_EVERY = 10 };

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Connect, send a byte and get it back. Null, or what failed. */
static const char *request(const char *address, const char *port, int seconds)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
	struct timeval limit = { .tv_sec = seconds };
	const char *failed = NULL;
	char byte = '.';
	int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (sock < 0)
		return "socket";
	inet_pton(AF_INET, address, &to.sin_addr);
	setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (connect(sock, (struct sockaddr *)&to, sizeof(to)))
		failed = "connect";
	else if (send(sock, &byte, 1, MSG_NOSIGNAL) != 1)
		failed = "send";
	else if (recv(sock, &byte, 1, 0) != 1)
		failed = "recv";
	close(sock);
	return failed;
}

int main(int count, char **words)
{
	long made = 0, tried = 0;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (;;) {
		double begun = now();
		const char *failed = request(words[1], words[2], WAIT_SECONDS);

		if (failed)
			printf("failed %.3f %.3f %s: %s\n", begun, now(), failed, strerror(errno));
		made++;
		for (int at = 3; made % FORBIDDEN_EVERY == 0 && at + 1 < count; at += 2, tried++)
			if (!request(words[at], words[at + 1], 1))
				printf("forbidden %s:%s was reached\n", words[at], words[at + 1]);
		if (made % COUNT_EVERY == 0)
			printf("count %ld %ld\n", made, tried);
		usleep(NAP_US);
	}
}
