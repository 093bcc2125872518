/*
 * What every C program has: stdio's buffers, thread-local storage, the
 * allocator, floating point, and a table of pointers to its own functions.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static __thread uint64_t local = 88172645463325252ull;
static char *kept[256];

static uint64_t next(void)
{
	local ^= local << 13;
	local ^= local >> 7;
	local ^= local << 17;
	return local;
}

static double by_root(double x) { return sqrt(x) + 1; }
static double by_sine(double x) { return sin(x) * 1000; }
static double by_log(double x) { return log(x * x + 1); }
static double (*const ways[])(double) = { by_root, by_sine, by_log };

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	long lines = argc > 1 ? atol(argv[1]) : 100;
	long pace_us = argc > 2 ? atol(argv[2]) : 10000;
	uint64_t sum = 0, many[500];
	double folded = 1;
	/* Made by whoever does not want to wait for the end. */
	char hurry[64];

	snprintf(hurry, sizeof hurry, "/srv/work/hurry.%d", getpid());

	for (long line = 0; line < lines; line++) {
		struct timespec pause = { pace_us / 1000000, pace_us % 1000000 * 1000 };

		for (int i = 0; i < 500; i++) {
			many[i] = next();
			folded = ways[many[i] % 3](folded);
		}
		qsort(many, 500, sizeof *many, ascending);
		free(kept[many[0] % 256]);
		kept[many[0] % 256] = strdup("kept over the move");
		if (!kept[many[0] % 256])
			return 1;
		sum = sum * 31 + many[250] + strlen(kept[many[0] % 256]);
		printf("%ld %016llx %.17g\n", line, (unsigned long long)sum, folded);
		/* Every other line waits in the buffer. */
		if (line % 2)
			fflush(stdout);
		if (pace_us && access(hurry, F_OK) && nanosleep(&pause, NULL)) {
			printf("FAIL nanosleep was interrupted\n");
			return 1;
		}
	}
	printf("PASS checksum %016llx\n", (unsigned long long)sum);
	return 0;
}
