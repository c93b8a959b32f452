// What the kernel alone takes to start a container: the bare system calls, in one process, without a check, a record or a
// second thread. It makes cgroups with limits, an overlay, the seven namespaces, id maps, a veth pair on a bridge with an
// address, /proc, /dev, /sys, a new root, no_new_privs and a bounding set, and runs a program whose first byte of output
// ends the time that it prints, in microseconds. No system call filter, no console, no disk of limited size.
//
//	limit DIR ROOT BRIDGE NUMBER CGROUP...      (a CGROUP that begins with 2: is of version 2)
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/mount.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/veth.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BASE 100000

static void die(const char *what) {
	fprintf(stderr, "limit: %s: %s\n", what, strerror(errno));
	exit(1);
}
static void ok(long r, const char *what) {
	if (r < 0) die(what);
}
static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}
static void put(const char *dir, const char *file, const char *text) {
	char p[4096];
	snprintf(p, sizeof p, "%s/%s", dir, file);
	int fd = open(p, O_WRONLY | O_CLOEXEC);
	ok(fd, p);
	ok(write(fd, text, strlen(text)), p);
	close(fd);
}
static int has(const char *dir, const char *file) {
	char p[4096];
	snprintf(p, sizeof p, "%s/%s", dir, file);
	return access(p, F_OK) == 0;
}

// One netlink message at a time.
static struct {
	struct nlmsghdr h;
	char b[1024];
} msg;
static void *begin(int type, int flags, size_t body) {
	memset(&msg, 0, sizeof msg);
	msg.h.nlmsg_len = NLMSG_LENGTH(body);
	msg.h.nlmsg_type = type;
	msg.h.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags;
	return NLMSG_DATA(&msg.h);
}
static struct rtattr *attr(int type, const void *data, int len) {
	struct rtattr *a = (void *)((char *)&msg + NLMSG_ALIGN(msg.h.nlmsg_len));
	a->rta_type = type;
	a->rta_len = RTA_LENGTH(len);
	if (len) memcpy(RTA_DATA(a), data, len);
	msg.h.nlmsg_len = NLMSG_ALIGN(msg.h.nlmsg_len) + RTA_ALIGN(a->rta_len);
	return a;
}
static void end(struct rtattr *a) { a->rta_len = (char *)&msg + msg.h.nlmsg_len - (char *)a; }
static void talk(int s, const char *what) {
	char in[4096];
	ok(send(s, &msg, msg.h.nlmsg_len, 0), what);
	ok(recv(s, in, sizeof in, 0), what);
	struct nlmsgerr *e = NLMSG_DATA((struct nlmsghdr *)in);
	errno = -e->error;
	if (e->error) die(what);
}

static int newfs(const char *type, int attrs, const char *key, const char *val) {
	int f = syscall(SYS_fsopen, type, 1);
	ok(f, type);
	if (key) ok(syscall(SYS_fsconfig, f, 1, key, val, 0), key);
	ok(syscall(SYS_fsconfig, f, 6, 0, 0, 0), type);
	int m = syscall(SYS_fsmount, f, 1, attrs);
	ok(m, type);
	close(f);
	return m;
}
static void moveto(int m, const char *path) {
	ok(syscall(SYS_move_mount, m, "", AT_FDCWD, path, 4), path);
	close(m);
}

static char cg[16][4096];

static void child(int sync, int out, int root, int number, char **group, int groups) {
	char c;
	// A single thread that moves itself waits for no grace period.
	for (int i = 0; i < groups; i++)
		if (strncmp(group[i], "2:", 2)) put(cg[i], "tasks", "0");
	ok(read(sync, &c, 1), "wait");
	ok(setresgid(0, 0, 0), "setresgid");
	ok(setresuid(0, 0, 0), "setresuid");
	int s = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	ok(s, "netlink");
	const char *names[] = {"lo", "eth0"};
	for (int i = 0; i < 2; i++) {
		struct ifinfomsg *l = begin(RTM_NEWLINK, 0, sizeof *l);
		l->ifi_index = if_nametoindex(names[i]);
		l->ifi_flags = l->ifi_change = IFF_UP;
		talk(s, "link up");
	}
	struct ifaddrmsg *a = begin(RTM_NEWADDR, NLM_F_CREATE, sizeof *a);
	a->ifa_family = AF_INET;
	a->ifa_prefixlen = 16;
	a->ifa_index = if_nametoindex("eth0");
	uint32_t ip = htonl(0x0a420000 + 256 + number);
	attr(IFA_LOCAL, &ip, 4);
	talk(s, "address");
	ok(mount(0, "/", 0, MS_REC | MS_SLAVE, 0), "slave");
	moveto(root, "/mnt");
	moveto(newfs("proc", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC, 0, 0), "/mnt/proc");
	moveto(newfs("sysfs", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC, 0, 0), "/mnt/sys");
	moveto(newfs("tmpfs", MOUNT_ATTR_NOSUID, "size", "64m"), "/mnt/dev");
	const char *nodes[] = {"null", "zero", "full", "random", "urandom", "tty"};
	for (int i = 0; i < 6; i++) {
		char from[64], to[64];
		snprintf(from, sizeof from, "/dev/%s", nodes[i]);
		snprintf(to, sizeof to, "/mnt/dev/%s", nodes[i]);
		int fd = open(to, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
		ok(fd, to);
		close(fd);
		int m = syscall(SYS_open_tree, AT_FDCWD, from, 1 | O_CLOEXEC);
		ok(m, from);
		moveto(m, to);
	}
	ok(chdir("/mnt"), "chdir");
	ok(syscall(SYS_pivot_root, ".", "."), "pivot_root");
	ok(umount2(".", MNT_DETACH), "umount");
	ok(sethostname("limit", 5), "sethostname");
	ok(prctl(PR_SET_PDEATHSIG, SIGKILL), "pdeathsig");
	ok(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
	for (int i = 0; i < 64; i++)
		if (i != 0 && i != 5 && i != 10 && prctl(PR_CAPBSET_DROP, i, 0, 0, 0) < 0) break;
	ok(dup2(out, 1), "dup2");
	char *args[] = {"sh", "-c", "echo ready; exec busybox sleep 10000", 0}, *env[] = {"PATH=/bin", 0};
	execve("/bin/sh", args, env);
	die("execve");
}

int main(int argc, char **argv) {
	if (argc < 6) return 2;
	const char *dir = argv[1], *lower = argv[2];
	int number = atoi(argv[4]), groups = argc - 5;
	char up[4096], work[4096];
	if (groups > 16) return 2;
	double began = now();
	for (int i = 0; i < groups; i++) {
		snprintf(cg[i], sizeof cg[i], "%s/limit%d", argv[5 + i] + (strncmp(argv[5 + i], "2:", 2) ? 0 : 2), number);
		ok(mkdir(cg[i], 0755), cg[i]);
		const char *limits[][2] = {{"memory.limit_in_bytes", "268435456"}, {"memory.max", "268435456"}, {"pids.max", "100"},
			{"cpu.shares", "1024"}, {"cpu.weight", "39"}, {"devices.deny", "a"}, {"devices.allow", "c *:* rwm"}};
		for (int k = 0; k < 7; k++)
			if (has(cg[i], limits[k][0])) put(cg[i], limits[k][0], limits[k][1]);
	}
	snprintf(up, sizeof up, "%s/u%d", dir, number);
	snprintf(work, sizeof work, "%s/w%d", dir, number);
	ok(mkdir(up, 0755), up);
	ok(chown(up, BASE, BASE), up);
	ok(mkdir(work, 0700), work);
	int f = syscall(SYS_fsopen, "overlay", 1);
	ok(f, "overlay");
	ok(syscall(SYS_fsconfig, f, 1, "lowerdir", lower, 0), "lowerdir");
	ok(syscall(SYS_fsconfig, f, 1, "upperdir", up, 0), "upperdir");
	ok(syscall(SYS_fsconfig, f, 1, "workdir", work, 0), "workdir");
	ok(syscall(SYS_fsconfig, f, 0, "volatile", 0, 0), "volatile");
	ok(syscall(SYS_fsconfig, f, 6, 0, 0, 0), "overlay");
	int root = syscall(SYS_fsmount, f, 1, 0);
	ok(root, "overlay");
	close(f);
	int sync[2], out[2];
	ok(pipe2(sync, O_CLOEXEC), "pipe");
	ok(pipe2(out, O_CLOEXEC), "pipe");
	int pidfd = -1, into = -1;
	struct clone_args ca = {.flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWUSER | CLONE_NEWCGROUP | CLONE_PIDFD,
		.pidfd = (uintptr_t)&pidfd, .exit_signal = SIGCHLD};
	for (int i = 0; i < groups; i++)
		if (!strncmp(argv[5 + i], "2:", 2)) {
			into = open(cg[i], O_PATH | O_CLOEXEC);
			ca.flags |= CLONE_INTO_CGROUP;
			ca.cgroup = into;
		}
	pid_t pid = syscall(SYS_clone3, &ca, sizeof ca);
	ok(pid, "clone3");
	if (pid == 0) child(sync[0], out[1], root, number, argv + 5, groups);
	char proc[64];
	snprintf(proc, sizeof proc, "/proc/%d", pid);
	put(proc, "uid_map", "0 100000 65536");
	put(proc, "gid_map", "0 100000 65536");
	int s = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	ok(s, "netlink");
	char ns[64], name[IFNAMSIZ];
	snprintf(ns, sizeof ns, "%s/ns/net", proc);
	snprintf(name, sizeof name, "limit%d", number);
	int nsfd = open(ns, O_RDONLY | O_CLOEXEC);
	ok(nsfd, ns);
	struct ifinfomsg *l = begin(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, sizeof *l), peer = {0};
	l->ifi_flags = l->ifi_change = IFF_UP;
	uint32_t one = 1, master = if_nametoindex(argv[3]);
	attr(IFLA_IFNAME, name, strlen(name) + 1);
	attr(IFLA_MASTER, &master, 4);
	attr(IFLA_NUM_TX_QUEUES, &one, 4);
	attr(IFLA_NUM_RX_QUEUES, &one, 4);
	struct rtattr *info = attr(IFLA_LINKINFO, 0, 0);
	attr(IFLA_INFO_KIND, "veth", 5);
	struct rtattr *data = attr(IFLA_INFO_DATA, 0, 0);
	struct rtattr *p = attr(VETH_INFO_PEER, &peer, sizeof peer);
	attr(IFLA_IFNAME, "eth0", 5);
	attr(IFLA_NUM_TX_QUEUES, &one, 4);
	attr(IFLA_NUM_RX_QUEUES, &one, 4);
	attr(IFLA_NET_NS_FD, &nsfd, 4);
	end(p);
	end(data);
	end(info);
	talk(s, "veth");
	ok(write(sync[1], "", 1), "go");
	close(out[1]);
	char c;
	if (read(out[0], &c, 1) != 1) die("the child did not start");
	printf("%.0f\n", now() - began);
	// The veth goes with the network namespace, in the kernel's own time.
	syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, 0, 0);
	waitpid(pid, 0, 0);
	close(root);
	for (int i = 0; i < groups; i++)
		for (int k = 0; rmdir(cg[i]) < 0 && errno == EBUSY && k < 5000; k++) usleep(1000);
	return 0;
}
