/* A process that takes long to search for a socket: many descriptor tables (threads that unshared theirs), each with many
 * descriptors. It needs no privilege.
 *
 *   many_tables TABLES DESCRIPTORS
 *
 * Prints "ready", and waits.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

static pthread_barrier_t all;

static void *hold_table(void *nothing)
{
	if (unshare(CLONE_FILES)) {
		perror("unshare");
		exit(1);
	}
	pthread_barrier_wait(&all);
	pause();
	return nothing;
}

int main(int count, char **words)
{
	int tables = atoi(words[1]), descriptors = atoi(words[2]), fd = open("/dev/null", O_RDONLY), i;
	struct rlimit limit;
	pthread_attr_t small;
	pthread_t thread;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	for (i = fd + 1; i < descriptors; i++) {
		if (dup2(fd, i) < 0) {
			perror("dup2");
			return 1;
		}
	}
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	pthread_barrier_init(&all, NULL, tables);
	for (i = 1; i < tables; i++) {
		if (pthread_create(&thread, &small, hold_table, NULL)) {
			perror("pthread_create");
			return 1;
		}
	}
	pthread_barrier_wait(&all);
	puts("ready");
	fflush(stdout);
	pause();
	return 0;
}
