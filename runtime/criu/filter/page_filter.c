/*
 * Loaded into a dumping CRIU with LD_PRELOAD: takes pages that the target already has out of the kernel's answers, and,
 * when told so, the host's connection tracking too. What smaps says of a task may be given as well.
 *
 * CRIU asks which pages of a task exist with ioctl(PAGEMAP_SCAN) on /proc/PID/pagemap. For ranges listed in a table
 * that the starter of CRIU fills, this object answers "nothing here", without asking the kernel; what remains is asked
 * for piece by piece. CRIU then neither splices nor sends those pages. Of shared memory it asks lseek(SEEK_DATA): where
 * such a segment is listed, there is no data.
 *
 * The table is a memory file, handed over as a descriptor number in the environment and mapped before main(). It counts
 * only once `published` is set, which happens while CRIU waits for an answer to its notification. Until then, and for
 * every task and every other ioctl, calls go to the kernel as they are.
 *
 * There is no libc in here (CRIU may run with another one than the compiler's): system calls are made directly, and the
 * only symbol from outside is __errno_location, which glibc and musl both have.
 */
#include <stdint.h>

#define PAGEMAP_SCAN 0xC0606610UL /* linux/fs.h: _IOWR('f', 16, struct pm_scan_arg) */
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
/* A known range shorter than this is scanned together with its neighbours: 64 pages cost as much as one more call. */
#define SHORT_BYTES (64 * 4096ULL)
#define REGIONS 512
#define MAGIC 0x324b434142474743ULL

#define FILTER_VARIABLE "CMIGRATE_PAGE_FILTER="

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

struct page_region {
	uint64_t start, end, categories;
};

struct range {
	uint64_t start, end;
};

struct task {
	uint64_t pid, first, count; /* of `count` ranges, sorted, from index `first` on */
	uint64_t mappings_at, mappings_bytes; /* the text of smaps, without its counts; 0 bytes: not known */
};

struct segment {
	uint64_t inode, major, minor, system_v; /* System V segments are numbered by themselves, on the same device */
};

/* table.py writes the same; the last eight are written here. */
struct table {
	uint64_t magic, capacity, published, tasks;
	uint64_t ranges_at; /* in bytes from the beginning; the tasks follow this header, then the segments */
	uint64_t options, segments;
	uint64_t loaded, calls, filtered, scans, removed_bytes, skipped_dumps, hidden_segments, mappings;
};

#define WITHOUT_CONNTRACK 1

extern int *__errno_location(void);

static struct table *table;

/* ------------------------------------------------------------------------------------------------ system calls */

#if defined(__x86_64__)
#define SYS_CLOSE 3
#define SYS_MMAP 9
#define SYS_IOCTL 16
#define SYS_READLINKAT 267
#define SYS_SENDMSG 46
#define SYS_GETSOCKOPT 55
#define SYS_LSEEK 8
#define SYS_STATX 332
#define SYS_WRITE 1
#define SYS_OPENAT 257
#define SYS_MEMFD_CREATE 319

static long kernel_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
#define SYS_CLOSE 57
#define SYS_MMAP 222
#define SYS_IOCTL 29
#define SYS_READLINKAT 78
#define SYS_SENDMSG 211
#define SYS_GETSOCKOPT 209
#define SYS_LSEEK 62
#define SYS_STATX 291
#define SYS_WRITE 64
#define SYS_OPENAT 56
#define SYS_MEMFD_CREATE 279

static long kernel_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc 0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
}
#else
#error "the page filter knows x86-64 and aarch64 only"
#endif

static long result_of(long result)
{
	if (result < 0 && result > -4096) {
		*__errno_location() = (int)-result;
		return -1;
	}
	return result;
}

/* ------------------------------------------------------------------------------------------------- the table */

static const char *after(const char *text, const char *prefix)
{
	while (*prefix)
		if (*text++ != *prefix++)
			return 0;
	return text;
}

static uint64_t number(const char **text)
{
	uint64_t value = 0;

	while (**text >= '0' && **text <= '9')
		value = value * 10 + (uint64_t)(*(*text)++ - '0');
	return value;
}

/* "TABLE:BYTES:LIBRARY", two descriptors and the table's size. */
static void map_table(const char *value)
{
	long fd = (long)number(&value), library, address;
	uint64_t bytes;

	value += *value == ':';
	bytes = number(&value);
	value += *value == ':';
	library = (long)number(&value);
	/* PROT_READ | PROT_WRITE, MAP_SHARED */
	address = kernel_call(SYS_MMAP, 0, (long)bytes, 3, 1, fd, 0);
	kernel_call(SYS_CLOSE, fd, 0, 0, 0, 0, 0);
	kernel_call(SYS_CLOSE, library, 0, 0, 0, 0, 0);
	if (address < 0 && address > -4096)
		return;
	table = (struct table *)address;
	if (bytes < sizeof(*table) || table->magic != MAGIC || table->capacity != bytes)
		table = 0;
	else
		table->loaded = 1;
}

/* glibc gives initialisers what it gives main(). Programs that CRIU starts get neither this object nor its table. */
__attribute__((constructor)) static void begin(int argc, char **argv, char **environment)
{
	char **kept = environment;
	const char *value;

	(void)argc;
	(void)argv;
	for (; environment && *environment; environment++) {
		value = after(*environment, FILTER_VARIABLE);
		if (value)
			map_table(value);
		else if (!after(*environment, "LD_PRELOAD="))
			*kept++ = *environment;
	}
	if (kept)
		*kept = 0;
}

/* What a descriptor refers to, its beginning at least; 0 when it can not be told. */
static int path_of(int fd, char *path, long room)
{
	char link[32] = "/proc/self/fd/", digits[12];
	int at = 14, count = 0;
	long length;

	for (unsigned int left = (unsigned int)fd; !count || left; left /= 10)
		digits[count++] = (char)('0' + left % 10);
	while (count)
		link[at++] = digits[--count];
	link[at] = 0;
	length = kernel_call(SYS_READLINKAT, -100, (long)link, (long)path, room - 1, 0, 0);
	if (length <= 0)
		return 0;
	path[length] = 0;
	return 1;
}

/* The task whose /proc/PID, followed by `rest`, this descriptor is, if it is in the table. */
static const struct task *task_of(int fd, const char *rest)
{
	const struct task *tasks = (const struct task *)(table + 1);
	uint64_t pid, index;
	const char *text;
	char path[64];

	if (!path_of(fd, path, sizeof(path)))
		return 0;
	/* "/proc/PID..."; "/PID..." when CRIU has its /proc mounted where we do not reach. */
	text = after(path, "/proc/");
	if (!text)
		text = path + (path[0] == '/');
	pid = number(&text);
	text = pid ? after(text, rest) : 0;
	if (!text || *text)
		return 0;
	for (index = 0; index < table->tasks; index++)
		if (tasks[index].pid == pid)
			return tasks + index;
	return 0;
}

/* The first of the task's ranges that ends above `address`; `count` when there is none. */
static uint64_t find(const struct range *ranges, uint64_t count, uint64_t address)
{
	uint64_t low = 0, high = count, middle;

	while (low < high) {
		middle = (low + high) / 2;
		if (ranges[middle].end > address)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

/* ----------------------------------------------------------------------------------------------- the answer */

struct answer {
	struct page_region *regions;
	uint64_t room, used;
};

/* `found` without the ranges from `known` on. Returns up to where it was answered: below found->end, the room is full. */
static uint64_t subtract(struct answer *answer, const struct page_region *found, const struct range *known,
			 const struct range *last)
{
	uint64_t at = found->start, stop;

	while (at < found->end) {
		while (known < last && known->end <= at)
			known++;
		if (known < last && known->start <= at) {
			stop = known->end < found->end ? known->end : found->end;
			table->removed_bytes += stop - at;
			at = stop;
			continue;
		}
		stop = known < last && known->start < found->end ? known->start : found->end;
		if (answer->used == answer->room)
			return at;
		answer->regions[answer->used].start = at;
		answer->regions[answer->used].end = stop;
		answer->regions[answer->used++].categories = found->categories;
		at = stop;
	}
	return at;
}

/* Ask the kernel about [from, to) and add what is not known. Sets `walked`; a negative result is an error's. */
static long scan_piece(int fd, const struct pm_scan_arg *wanted, uint64_t from, uint64_t to, struct answer *answer,
		       const struct range *known, const struct range *last, uint64_t *walked)
{
	struct page_region found[REGIONS];
	struct pm_scan_arg scan;
	uint64_t reached;
	long count, index;

	scan.size = sizeof(scan);
	scan.flags = 0;
	scan.start = from;
	scan.end = to;
	scan.walk_end = 0;
	scan.vec = (uint64_t)found;
	scan.vec_len = REGIONS;
	scan.max_pages = 0;
	scan.category_inverted = wanted->category_inverted;
	scan.category_mask = wanted->category_mask;
	scan.category_anyof_mask = wanted->category_anyof_mask;
	scan.return_mask = wanted->return_mask;
	count = kernel_call(SYS_IOCTL, fd, PAGEMAP_SCAN, (long)&scan, 0, 0, 0);
	if (count < 0)
		return count;
	table->scans++;
	*walked = scan.walk_end;
	for (index = 0; index < count; index++) {
		reached = subtract(answer, found + index, known, last);
		if (reached < found[index].end) {
			*walked = reached;
			break;
		}
	}
	return count;
}

static long filtered_scan(int fd, struct pm_scan_arg *wanted, const struct task *task)
{
	const struct range *ranges = (const struct range *)((const char *)table + table->ranges_at) + task->first;
	struct answer answer;
	uint64_t at = wanted->start, next = find(ranges, task->count, at), first, stop;
	long result;

	answer.regions = (struct page_region *)wanted->vec;
	answer.room = wanted->vec_len;
	answer.used = 0;
	while (at < wanted->end && answer.used < answer.room) {
		while (next < task->count && ranges[next].end <= at)
			next++;
		if (next < task->count && ranges[next].start <= at) {
			stop = ranges[next].end < wanted->end ? ranges[next].end : wanted->end;
			table->removed_bytes += stop - at;
			at = stop;
			continue;
		}
		/* Up to the next known range that is worth a call of its own. */
		first = next;
		while (next < task->count && next - first < REGIONS && ranges[next].start < wanted->end &&
		       ranges[next].end - ranges[next].start < SHORT_BYTES)
			next++;
		stop = next < task->count && ranges[next].start < wanted->end ? ranges[next].start : wanted->end;
		result = scan_piece(fd, wanted, at, stop, &answer, ranges + first, ranges + next, &at);
		if (result < 0)
			return result;
		next = first;
	}
	wanted->walk_end = at;
	table->filtered++;
	return (long)answer.used;
}

/* ------------------------------------------------------------------------------------------------ libc's names */

/* Which of CRIU's scans ask for existing pages, and only that. Others (guard pages, protection) are not ours. */
static int is_for_pages(const struct pm_scan_arg *wanted)
{
	return wanted->size == sizeof(*wanted) && !wanted->flags && !wanted->max_pages && wanted->vec && wanted->vec_len &&
	       wanted->category_anyof_mask == (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) && wanted->start < wanted->end;
}

/* Variadic in libc; on both architectures the third argument is passed in the same register. */
__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, void *argument)
{
	const struct task *task;

	if (request == PAGEMAP_SCAN && table) {
		table->calls++;
		if (__atomic_load_n(&table->published, __ATOMIC_ACQUIRE) && is_for_pages(argument)) {
			task = task_of(fd, "/pagemap");
			if (task && task->count)
				return (int)result_of(filtered_scan(fd, argument, task));
		}
	}
	return (int)result_of(kernel_call(SYS_IOCTL, fd, (long)request, (long)argument, 0, 0, 0));
}

struct statx {
	uint32_t unused_1[8];
	uint64_t inode;
	uint32_t unused_2[24];
	uint32_t major, minor;
	uint32_t unused_3[28];
};

#define AT_EMPTY_PATH 0x1000
#define STATX_INO 0x100
#define SEEK_DATA 3
#define NO_SUCH_DATA 6 /* ENXIO */

static int is_hidden_segment(int fd)
{
	const struct segment *segments =
		(const struct segment *)((const struct task *)(table + 1) + table->tasks);
	uint64_t index, system_v;
	struct statx status;
	char path[64];

	if (!table->segments || !path_of(fd, path, sizeof(path)))
		return 0;
	system_v = after(path, "/SYSV") != 0;
	if (kernel_call(SYS_STATX, fd, (long)"", AT_EMPTY_PATH, STATX_INO, (long)&status, 0))
		return 0;
	for (index = 0; index < table->segments; index++)
		if (segments[index].inode == status.inode && segments[index].major == status.major &&
		    segments[index].minor == status.minor && segments[index].system_v == system_v)
			return 1;
	return 0;
}

/* CRIU walks shared memory by its data; without any it takes the whole segment for a hole. */
__attribute__((visibility("default"))) long lseek64(int fd, long offset, int whence)
{
	if (whence == SEEK_DATA && table && __atomic_load_n(&table->published, __ATOMIC_ACQUIRE) &&
	    is_hidden_segment(fd)) {
		table->hidden_segments++;
		*__errno_location() = NO_SUCH_DATA;
		return -1;
	}
	return result_of(kernel_call(SYS_LSEEK, fd, offset, whence, 0, 0, 0));
}

/* A CRIU that was not built with glibc has this name. */
__attribute__((visibility("default"))) long lseek(int fd, long offset, int whence)
{
	return lseek64(fd, offset, whence);
}

/* The task's mappings as a file of their own; a negative number when that can not be had. */
static long mappings_of(const struct task *task)
{
	const char *text = (const char *)table + task->mappings_at;
	uint64_t written = 0;
	long fd, count;

	fd = kernel_call(SYS_MEMFD_CREATE, (long)"mappings", 1 /* MFD_CLOEXEC */, 0, 0, 0, 0);
	if (fd < 0)
		return fd;
	while (written < task->mappings_bytes) {
		count = kernel_call(SYS_WRITE, fd, (long)(text + written), (long)(task->mappings_bytes - written), 0, 0, 0);
		if (count <= 0) {
			kernel_call(SYS_CLOSE, fd, 0, 0, 0, 0, 0);
			return -1;
		}
		written += (uint64_t)count;
	}
	kernel_call(SYS_LSEEK, fd, 0, 0, 0, 0, 0);
	table->mappings++;
	return fd;
}

/* CRIU opens what it reads of a task relative to its directory in /proc. */
static int open_at(int directory, const char *path, int flags, unsigned int mode)
{
	const struct task *task;
	const char *rest;
	long fd;

	rest = table && path && !flags ? after(path, "smaps") : 0;
	if (rest && !*rest && __atomic_load_n(&table->published, __ATOMIC_ACQUIRE)) {
		task = task_of(directory, "");
		if (task && task->mappings_bytes) {
			fd = mappings_of(task);
			if (fd >= 0)
				return (int)fd;
		}
	}
	return (int)result_of(kernel_call(SYS_OPENAT, directory, (long)path, flags, mode, 0, 0));
}

/* Variadic in libc, as ioctl. The names of a build with large files by request, and of one where all are large. */
__attribute__((visibility("default"))) int openat64(int directory, const char *path, int flags, unsigned int mode)
{
	return open_at(directory, path, flags, mode);
}

__attribute__((visibility("default"))) int openat(int directory, const char *path, int flags, unsigned int mode)
{
	return open_at(directory, path, flags, mode);
}

struct message {
	void *name;
	uint32_t name_bytes;
	struct {
		void *base;
		uint64_t bytes;
	} * parts;
	uint64_t parts_count;
	void *control;
	uint64_t control_bytes;
	int flags;
};

struct netlink_header {
	uint32_t bytes;
	uint16_t type, flags;
	uint32_t sequence, port;
};

#define NETLINK_NETFILTER 12
#define CONNTRACK_GET (1 << 8 | 1) /* NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET */
#define NLM_F_REQUEST 0x001
#define NLM_F_ACK 0x004
#define NLM_F_DUMP 0x300
#define NLMSG_NOOP 1
#define SOL_SOCKET 1
#define SO_PROTOCOL 38

static int asks_for_conntrack(int fd, const struct message *message)
{
	const struct netlink_header *header;
	int protocol = -1, bytes = sizeof(protocol);

	if (message->parts_count != 1 || message->parts[0].bytes < sizeof(*header))
		return 0;
	header = message->parts[0].base;
	if (header->type != CONNTRACK_GET || (header->flags & NLM_F_DUMP) != NLM_F_DUMP)
		return 0;
	kernel_call(SYS_GETSOCKOPT, fd, SOL_SOCKET, SO_PROTOCOL, (long)&protocol, (long)&bytes, 0);
	return protocol == NETLINK_NETFILTER;
}

/*
 * CRIU dumps the network namespace's connection tracking twice, and each time the kernel walks the table of the whole
 * host. Where nothing is restored from it, a request that does nothing is sent instead: its acknowledgement ends the
 * dump with no entry.
 */
__attribute__((visibility("default"))) long sendmsg(int fd, struct message *message, int flags)
{
	struct netlink_header *header;

	if (table && table->options & WITHOUT_CONNTRACK && asks_for_conntrack(fd, message)) {
		header = message->parts[0].base;
		header->type = NLMSG_NOOP;
		header->flags = NLM_F_REQUEST | NLM_F_ACK;
		table->skipped_dumps++;
	}
	return result_of(kernel_call(SYS_SENDMSG, fd, (long)message, flags, 0, 0, 0));
}
