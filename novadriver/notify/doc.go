// Package notify tells others than Nova what happens to instances, as oslo.messaging's notifier does: messages
// "compute.instance.pause.start" on the topic "notifications" in the old form, and "instance.pause.start" as versioned
// objects on "versioned_notifications". Nova itself listens to none of them.
//
// A [Notifier] starts one goroutine, which encodes and sends in order; Close waits for it. What it has not sent lies in
// a bounded queue in memory. Nothing is on disk: as in Nova, a notification is sent at most once and may get lost.
//
// What an event is called and what its payload holds are facts of nova/notifications (objects/instance.py, base.py) and
// of the calls in nova/compute/manager.py.
package notify
