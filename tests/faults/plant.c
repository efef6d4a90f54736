// SPDX-License-Identifier: GPL-2.0
/*
 * Whoever loads this module makes the kernel do something wrong: what the parameter "fault" names,
 * in a thread of that name. Loading it fails with ECANCELED when that has been done. "make
 * check-debug" sees by it that the debug kernel finds such faults; tests/guest/src/checkers.rs says
 * what the kernel has to say of each.
 */
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/rculist.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/timer.h>
#include <linux/workqueue.h>

/* rust.rs */
void rust_leak(void);
void rust_use_after_free(void);
void rust_double_free(void);
void rust_out_of_bounds(void);
void rust_out_of_vmalloc_bounds(void);
void rust_sleep_under_spinlock(void);
void rust_lock_inversion(void);
void rust_overflow(void);
void rust_debug_assertion(void);

static char *fault;
module_param(fault, charp, 0);

static void __rcu *published;

static void rcu_dereference_unlocked(void)
{
	(void)rcu_dereference(published);
}

static void rcu_list_unlocked(void)
{
	struct entry {
		struct list_head list;
	} *entry;
	LIST_HEAD(empty);

	list_for_each_entry_rcu(entry, &empty, list)
		;
}

static void do_nothing(struct timer_list *timer)
{
}

static void free_running_timer(void)
{
	struct timer_list *timer = kmalloc(sizeof(*timer), GFP_KERNEL);

	if (!timer)
		return;
	timer_setup(timer, do_nothing, 0);
	mod_timer(timer, jiffies + 60 * HZ);
	kfree(timer);
}

static void spin(struct work_struct *work)
{
	unsigned long end = jiffies + 12 * HZ;

	while (time_before(jiffies, end))
		cpu_relax();
}

/* The annotation would be INIT_WORK_ONSTACK. */
static void unannotated_work_on_stack(void)
{
	struct work_struct work;

	INIT_WORK(&work, spin);
	destroy_work_on_stack(&work);
}

static void delete_list_entry_twice(void)
{
	struct list_head entry;
	LIST_HEAD(head);

	list_add(&entry, &head);
	list_del(&entry);
	list_del(&entry);
}

static void shift_too_far(void)
{
	int distance = 40, one = 1;

	OPTIMIZER_HIDE_VAR(distance);
	OPTIMIZER_HIDE_VAR(one);
	one <<= distance;
	OPTIMIZER_HIDE_VAR(one);
}

static void index_too_large(void)
{
	/* What lies behind the array keeps KASAN out of this. */
	static struct {
		int array[4];
		int behind[4];
	} numbers;
	int index = 5;

	OPTIMIZER_HIDE_VAR(index);
	WRITE_ONCE(numbers.array[index], 1);
}

/* kthread_stop wakes it. */
static void hang(void)
{
	long left = 15 * HZ;

	while (left)
		left = schedule_timeout_uninterruptible(left);
}

static void hog_processor(void)
{
	preempt_disable();
	spin(NULL);
	preempt_enable();
}

/* Nobody serves the second one's queue while the first one runs, which neither ends nor sleeps. */
static void hog_work_queue(void)
{
	struct work_struct works[2];
	int i, cpu = raw_smp_processor_id();

	for (i = 0; i < 2; i++) {
		INIT_WORK_ONSTACK(&works[i], spin);
		queue_work_on(cpu, system_percpu_wq, &works[i]);
	}
	for (i = 0; i < 2; i++) {
		flush_work(&works[i]);
		destroy_work_on_stack(&works[i]);
	}
}

static const struct {
	const char *name;
	void (*plant)(void);
} faults[] = {
	{ "rcu_dereference_unlocked", rcu_dereference_unlocked },
	{ "rcu_list_unlocked", rcu_list_unlocked },
	{ "sleep_under_spinlock", rust_sleep_under_spinlock },
	{ "lock_inversion", rust_lock_inversion },
	{ "leak", rust_leak },
	{ "use_after_free", rust_use_after_free },
	{ "double_free", rust_double_free },
	{ "out_of_bounds", rust_out_of_bounds },
	{ "out_of_vmalloc_bounds", rust_out_of_vmalloc_bounds },
	{ "free_running_timer", free_running_timer },
	{ "unannotated_work_on_stack", unannotated_work_on_stack },
	{ "delete_list_entry_twice", delete_list_entry_twice },
	{ "shift_too_far", shift_too_far },
	{ "index_too_large", index_too_large },
	{ "hang", hang },
	{ "hog_processor", hog_processor },
	{ "hog_work_queue", hog_work_queue },
	{ "overflow", rust_overflow },
	{ "debug_assertion", rust_debug_assertion },
};

static DECLARE_COMPLETION(started);

static int run(void *plant)
{
	complete(&started);
	((void (*)(void))plant)();
	return 0;
}

/* A thread of its own, which a panic may end. */
static int __init plant(void)
{
	struct task_struct *thread;
	int i;

	for (i = 0; i < ARRAY_SIZE(faults); i++)
		if (fault && !strcmp(fault, faults[i].name))
			break;
	if (i == ARRAY_SIZE(faults))
		return -EINVAL;
	thread = kthread_create(run, faults[i].plant, "%s", fault);
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	get_task_struct(thread);
	wake_up_process(thread);
	wait_for_completion(&started);
	kthread_stop_put(thread);
	return -ECANCELED;
}
module_init(plant);

MODULE_DESCRIPTION("Faults, to be found by the debug kernel");
MODULE_LICENSE("GPL");
