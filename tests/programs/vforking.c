/* Binds in a child that vfork made, on a socket of the parent's, and then listens in the parent.
 *
 *   vforking PORT
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static struct sockaddr_in to;

int main(int argc, char **argv)
{
	int listener = socket(AF_INET, SOCK_STREAM, 0), status = 0;
	pid_t child;

	if (argc != 2)
		return 2;
	to.sin_family = AF_INET;
	to.sin_port = htons(atoi(argv[1]));
	child = vfork();
	if (child == 0)
		execl("/bin/true", "true", (char *)0);
	waitpid(child, &status, 0);
	if (status || bind(listener, (void *)&to, sizeof(to)) || listen(listener, 8)) {
		perror("vforking");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int peer = accept(listener, 0, 0);
		FILE *lines = peer < 0 ? 0 : fdopen(peer, "w");

		if (!lines)
			return 1;
		fputs("hello\n", lines);
		fclose(lines);
	}
}
