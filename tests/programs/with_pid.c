/* Starts a command in a process with a given process id: that of one that has ended, which chance would reuse some day.
 *
 *   with_pid PID COMMAND...
 *
 * Prints "started" when the command runs, and its exit status when it has ended. The command ends with this program.
 */
#define _GNU_SOURCE
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	pid_t number = argc > 2 ? atoi(argv[1]) : 0;
	struct clone_args how = {
		.exit_signal = SIGCHLD,
		.set_tid = (uintptr_t)&number,
		.set_tid_size = 1,
	};
	int status;
	long child = syscall(SYS_clone3, &how, sizeof(how));

	if (child < 0) {
		perror("clone3");
		return 1;
	}
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execvp(argv[2], argv + 2);
		_exit(127);
	}
	puts("started");
	fflush(stdout);
	if (waitpid(child, &status, 0) == child)
		printf("ended %d\n", WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
	return 0;
}
