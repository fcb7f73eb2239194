/* Puts text into the input of its controlling terminal, where the next reader takes it for typed by the user.
 *
 *   typing native|upper|i386|x32 TEXT
 *
 * WAY: by the plain system call; with the upper half of the request set, which the kernel does not look at; by the
 * table of 32-bit programs; by that of x32's. Prints "typed" or the errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static long type(const char *way, int terminal, const char *letter)
{
	if (!strcmp(way, "native"))
		return syscall(SYS_ioctl, terminal, (unsigned long)TIOCSTI, letter);
	if (!strcmp(way, "upper"))
		return syscall(SYS_ioctl, terminal, 0xdeadbeef00000000ul | TIOCSTI, letter);
#ifdef __x86_64__
	if (!strcmp(way, "x32"))
		return syscall(0x40000000 + 514, terminal, (unsigned long)TIOCSTI, letter);
	if (!strcmp(way, "i386")) {
		long result;

		asm volatile("int $0x80" : "=a"(result) : "a"(54), "b"(terminal), "c"(TIOCSTI), "d"(letter) : "memory");
		errno = -result;
		return result < 0 ? -1 : result;
	}
#endif
	errno = ENOSYS;
	return -1;
}

int main(int argc, char **argv)
{
	int terminal = open("/dev/tty", O_RDWR);
	char *letter = mmap((void *)0x10000000, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (argc != 3 || terminal < 0 || letter == MAP_FAILED) {
		perror("typing");
		return 2;
	}
	for (const char *at = argv[2]; *at; at++) {
		*letter = *at;
		if (type(argv[1], terminal, letter) < 0) {
			puts(strerrorname_np(errno));
			return 1;
		}
	}
	puts("typed");
	return 0;
}
