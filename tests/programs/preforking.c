/* A preforking server: each of its workers has a listener of its own at the port, by SO_REUSEPORT.
 *
 *   preforking WORKERS PORT
 *
 * A worker sends its number to each client. Prints "ready" for each worker that listens.
 */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int workers = atoi(argv[1]), port = atoi(argv[2]), one = 1;

	if (argc != 3)
		return 2;
	for (int worker = 0; worker < workers; worker++) {
		struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
		int listener, peer;

		if (fork())
			continue;
		listener = socket(AF_INET, SOCK_STREAM, 0);
		setsockopt(listener, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one));
		if (bind(listener, (void *)&to, sizeof(to)) || listen(listener, 64)) {
			perror("preforking");
			_exit(1);
		}
		dprintf(1, "ready\n");
		while ((peer = accept(listener, 0, 0)) >= 0) {
			dprintf(peer, "%d\n", worker);
			close(peer);
		}
		_exit(1);
	}
	while (wait(0) > 0)
		;
	return 0;
}
