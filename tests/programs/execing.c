/* Executes itself twice, and makes the kernel wait both times with its exec_update_lock held: a descriptor of a FUSE file
 * system is closed then. Until that is over nobody copies a descriptor of it (pidfd_getfd(2)).
 *
 *   execing FOLDER FIRST LATER [wait]   the seconds that closing FOLDER/dFIRST, and FOLDER/dLATER, takes
 *
 * A listener is its descriptor 9. With "wait" it begins when descriptor 8 can be read.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct pollfd start = { .fd = 8, .events = POLLIN };
	char path[256];

	snprintf(path, sizeof(path), "%s/d%s", argv[1], argv[2]);
	open(path, O_RDONLY | O_CLOEXEC);
	if (argc > 4)
		poll(&start, 1, -1);
	execl("/proc/self/exe", "execing", argv[1], argv[3], argv[3], NULL);
	perror("exec");
	return 1;
}
