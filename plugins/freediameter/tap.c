/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Takes messages from the host, and gives them back.
 *
 *   request for this host   on_local takes it      -> s6a_request()  -> the host's handler
 *   request that passes     on_request takes it    -> s6a_request()  -> sent on
 *   answer that passes      on_answer takes it     -> s6a_answer()   -> sent on
 *   answer of this host     on_outgoing takes it   -> s6a_answer()   -> sent
 *
 * A message belongs to the holder of the pointer. The host's thread handles it as long as that needs no call: for most
 * requests, to the end. If a call is needed, the message goes to the calls' thread, which waits for nothing but its
 * calls. From there it goes to the host's handlers in threads of our own, since these may wait for a database: so
 * neither the calls nor the host's dispatchers are held up.
 */
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "kme.h"

#define MAX_WAITING	4096	/* requests for the calls' thread, or for the host's handlers */
#define MAX_OUTGOING	10000	/* a peer that does not read is closed by its watchdog long before */
#define MAX_HANDLERS	64
#define TURN_MS		1000

/* Not in the headers: the queue of all that is sent. A weak symbol, so that a host without it can be told. */
extern struct fifo *fd_g_outgoing __attribute__((weak));

struct queue {
	pthread_mutex_t lock;
	pthread_cond_t more;
	struct job *first, *last;
	long n;
	int ended;
};

#define QUEUE	{ .lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER }
static struct queue inbox = QUEUE;	/* for the calls' thread */
static struct queue ready = QUEUE;	/* for the handlers' threads */

static struct fifo *tapped;		/* what the host uses as its queue of outgoing messages */
static _Atomic(struct fifo *) outgoing;	/* and that queue itself */
static pthread_t calls_thread, handler_threads[MAX_HANDLERS];
static int handlers, calls_running;
static atomic_int stopping;
static atomic_int inside;		/* threads of the host in on_outgoing() */
static struct disp_hdl *local_handle;
static struct fd_rt_fwd_hdl *request_handle, *answer_handle;
static struct fd_hook_hdl *peer_handle;
static _Thread_local int in_handler;	/* the dispatcher is called by a thread of ours: the message was handled */

/* 0: there is no room. There always is for NULL, which ends the waiting threads. */
static int queue_add(struct queue *q, struct job *j, long room)
{
	int added = 0;

	pthread_mutex_lock(&q->lock);
	if (!j) {
		q->ended = 1;
	} else if (q->n < room) {
		j->next = NULL;
		*(q->first ? &q->last->next : &q->first) = j;
		q->last = j;
		added = (int)++q->n;
	}
	pthread_cond_signal(&q->more);
	pthread_mutex_unlock(&q->lock);
	return added;
}

static struct job *queue_take(struct queue *q, int wait)
{
	struct job *j;

	pthread_mutex_lock(&q->lock);
	while (!q->first && wait && !q->ended)
		pthread_cond_wait(&q->more, &q->lock);
	if ((j = q->first)) {
		q->first = j->next;
		q->n--;
	} else {
		pthread_cond_signal(&q->more);	/* the next thread must see the end, too */
	}
	pthread_mutex_unlock(&q->lock);
	return j;
}

/* Sends without the tap, and does not wait for room. */
static void send_on(struct msg *m)
{
	struct fifo *to = outgoing;

	if (stopping || (to && fd_fifo_length(to) >= MAX_OUTGOING) ||
	    (to ? fd_fifo_post_noblock(to, (void *)&m) : fd_msg_send(&m, NULL, NULL)))
		fd_msg_free(m);
}

/* Continues with a message after its call, until the next call. */
static void run(struct job *j)
{
	enum verdict v;

	for (;;) {
		v = stopping ? DROP : j->step(j);
		if (v == ASK) {
			if (kme_start(&j->call))
				return;
		} else if (v == GO_ON && j->kind == REQUEST_LOCAL) {
			if (queue_add(&ready, j, MAX_WAITING))
				return;
			count(OVERLOADED);
			say_refused(j->msg, j->imsi, j->origin, "too many wait for the host's handlers");
			if (s6a_refuse(&j->msg, "DIAMETER_TOO_BUSY", 0)) {
				v = DROP;
				break;
			}
			j->kind = ANSWER;
			j->step = s6a_answer;
		} else {
			break;
		}
	}
	if (v == DROP)
		fd_msg_free(j->msg);
	else
		send_on(j->msg);
	free(j);
}

static void came_back(struct kme_call *c)
{
	run((struct job *)c);
}

static void start_call(struct job *j)
{
	if (stopping || !kme_start(&j->call))
		run(j);
}

static void *calls_run(void *arg)
{
	struct job *j;

	fd_log_threadname("kme calls");
	while (!stopping) {
		kme_turn(TURN_MS);
		while ((j = queue_take(&inbox, 0)))
			start_call(j);
		tell(0);
	}
	kme_service_end();
	tell(1);
	return NULL;
}

/*
 * Handles a message until it needs a call. What is left in *m goes on where it was going; NULL: nothing is left. There
 * is always room for an answer: its request took it.
 */
static void begin(enum kind kind, struct msg **m)
{
	struct job *j = stopping ? NULL : calloc(1, sizeof(*j));
	enum verdict v = DROP;
	int n;

	if (j) {
		j->call.done = came_back;
		j->kind = kind;
		j->msg = *m;
		j->step = kind == ANSWER ? s6a_answer : s6a_request;
		v = j->step(j);
		*m = j->msg;
	}
	if (v == ASK) {
		n = queue_add(&inbox, j, kind == ANSWER ? LONG_MAX : MAX_WAITING);
		if (n == 1)
			kme_wake();
		if (n) {
			*m = NULL;
			return;
		}
		count(OVERLOADED);
		v = s6a_refuse(m, "DIAMETER_TOO_BUSY", 0) ? DROP : REPLY;
	}
	if (v == DROP)
		fd_msg_free(*m);
	else if (v == REPLY)
		send_on(*m);
	if (v != GO_ON)
		*m = NULL;
	free(j);
}

/* Calls the host's handler, as the dispatcher would. What the handler sends comes by the tap. */
static void dispatch(struct msg *m)
{
	struct session *session = NULL;
	enum disp_action action = DISP_ACT_ERROR;
	char *code = NULL, *text = NULL;
	struct msg *dropped = NULL;

	if (fd_msg_sess_get(fd_g_config->cnf_dict, m, &session, NULL))
		session = NULL;
	CHECK_FCT_DO(fd_msg_dispatch(&m, session, &action, &code, &text, &dropped), );
	if (dropped)
		fd_msg_free(dropped);
	if (!m)
		return;
	if (action == DISP_ACT_CONT && !fd_g_config->cnf_flags.no_fwd)
		action = DISP_ACT_SEND;	/* no handler has answered it: it is sent on */
	if (action == DISP_ACT_CONT)
		code = "DIAMETER_COMMAND_UNSUPPORTED";
	if (action != DISP_ACT_SEND && s6a_refuse(&m, code ? code : "DIAMETER_UNABLE_TO_COMPLY", 0)) {
		fd_msg_free(m);
		return;
	}
	if (s6a_takes(m, 0))
		begin(ANSWER, &m);
	if (m)
		send_on(m);
}

static void *handler_run(void *arg)
{
	struct job *j;

	fd_log_threadname("kme handler");
	in_handler = 1;
	while ((j = queue_take(&ready, 1))) {
		if (stopping)	/* the handlers may have ended meanwhile */
			fd_msg_free(j->msg);
		else
			dispatch(j->msg);
		free(j);
	}
	return NULL;
}

/*
 * The host calls this, in the same thread, for each message that it puts into the tapped queue. An answer with a source
 * is a forwarded one, which on_answer has handled.
 */
static void on_outgoing(struct fifo *queue, void **data)
{
	struct msg *m, *request = NULL;
	DiamId_t source = NULL;
	int before;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
	inside++;
	if (!fd_fifo_tryget(queue, &m)) {
		if (s6a_takes(m, 0) && !fd_msg_source_get(m, &source, NULL) && !source &&
		    !fd_msg_answ_getq(m, &request) && request)
			begin(ANSWER, &m);
		if (m)
			send_on(m);
	}
	inside--;
	pthread_setcancelstate(before, NULL);
}

/* Signals are for the host's threads. */
static int start(pthread_t *thread, void *(*run)(void *))
{
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(thread, NULL, run, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return err;
}

/*
 * There is no public function that holds back an answer of a local application: the hook before sending can only block
 * the one thread that sends everything. So the handlers' answers are taken from a queue of ours, which calls us at each
 * message (its upper threshold is 1), and is empty again when the call returns. This is done at the first request: by
 * then, the threads that empty the real queue have its pointer. At the end, the core destroys the queue that it knows,
 * but not one with data for a threshold; the real queue is ours.
 */
static void tap(void)
{
	if (!&fd_g_outgoing) {
		LOG_F("kme: this freeDiameter does not let the answers of its own applications be changed: load "
		      "kme.fdx in an agent before it");
		return;
	}
	if (fd_fifo_new(&tapped, 0) || fd_fifo_setthrhd(tapped, &tapped, 1, on_outgoing, 0, NULL))
		return;
	outgoing = fd_g_outgoing;
	__atomic_store_n(&fd_g_outgoing, tapped, __ATOMIC_SEQ_CST);
}

/* The host may cancel its threads while they wait, so that is off in here. */
static void take_request(enum kind kind, struct msg **m)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	int before;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
	pthread_once(&once, tap);
	if (kind == REQUEST_PASSING || outgoing) {
		begin(kind, m);
	} else if (!s6a_refuse(m, "DIAMETER_UNABLE_TO_COMPLY", 0)) {	/* otherwise its answer would be sent as it is */
		send_on(*m);
		*m = NULL;
	} else {
		fd_msg_free(*m);
		*m = NULL;
	}
	pthread_setcancelstate(before, NULL);
}

/* An error from here would end the daemon. */
static int on_local(struct msg **m, struct avp *avp, struct session *session, void *data, enum disp_action *action)
{
	if (!in_handler && s6a_takes(*m, 1))
		take_request(REQUEST_LOCAL, m);
	return 0;
}

static int on_request(void *data, struct msg **m)
{
	if (s6a_takes(*m, 1))
		take_request(REQUEST_PASSING, m);
	return 0;
}

static int on_answer(void *data, struct msg **m)
{
	struct msg *request = NULL;
	DiamId_t source = NULL;
	int before;

	/* Answers to the host's own requests are not ours. */
	if (!s6a_takes(*m, 0) || fd_msg_answ_getq(*m, &request) || !request ||
	    fd_msg_source_get(request, &source, NULL) || !source)
		return 0;
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
	begin(ANSWER, m);
	pthread_setcancelstate(before, NULL);
	return 0;
}

/* By now all extensions have defined their dictionaries, and no message was parsed by them yet. */
static void on_peer(enum fd_hook_type type, struct msg *m, struct peer_hdr *peer, void *other,
		    struct fd_hook_permsgdata *pmd, void *data)
{
	int before;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
	dict_ready();
	pthread_setcancelstate(before, NULL);
}

int tap_start(void)
{
	CHECK_FCT(start(&calls_thread, calls_run));
	calls_running = 1;
	for (; handlers < conf.handlers; handlers++)
		CHECK_FCT(start(&handler_threads[handlers], handler_run));
	CHECK_FCT(fd_hook_register(HOOK_MASK(HOOK_PEER_CONNECT_SUCCESS), on_peer, NULL, NULL, &peer_handle));
	CHECK_FCT(fd_disp_register(on_local, DISP_HOW_ANY, NULL, NULL, &local_handle));
	CHECK_FCT(fd_rt_fwd_register(on_request, NULL, RT_FWD_REQ, &request_handle));
	return fd_rt_fwd_register(on_answer, NULL, RT_FWD_ANS, &answer_handle);
}

void tap_end(void)
{
	struct fifo *to = outgoing;
	struct job *j;
	struct msg *m;
	int i;

	stopping = 1;
	if (peer_handle)
		fd_hook_unregister(peer_handle);
	if (local_handle)
		fd_disp_unregister(&local_handle, NULL);
	if (request_handle)
		fd_rt_fwd_unregister(request_handle, NULL);
	if (answer_handle)
		fd_rt_fwd_unregister(answer_handle, NULL);
	if (calls_running) {
		kme_wake();
		pthread_join(calls_thread, NULL);
	} else {
		kme_service_end();
	}
	queue_add(&ready, NULL, 0);
	for (i = 0; i < handlers; i++)
		pthread_join(handler_threads[i], NULL);
	while (inside)
		usleep(1000);
	kme_wake_end();
	while ((j = queue_take(&inbox, 0)))
		run(j);
	while (to && !fd_fifo_tryget(to, &m))
		fd_msg_free(m);
	if (to)
		fd_fifo_del(&to);
}
