/* bcc asks for the name only. */
#ifndef PAGE_SIZE
#define PAGE_SIZE 4096
#endif
