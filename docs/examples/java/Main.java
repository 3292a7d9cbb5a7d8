// Submits a job once, follows it over every broken connection, and prints how it ended.
//
//   protoc -I protos --java_out=stubs --grpc-java_out=stubs jobsvc/v1/job.proto jobsvc/v1/job_service.proto
//   javac -cp $CLASSPATH:stubs -sourcepath stubs -d classes Main.java
//   java -cp $CLASSPATH:classes Main demo.sleep '{"seconds": 5, "steps": 5}' order-17
//
// with grpc-netty, grpc-protobuf, grpc-stub and protobuf-java-util, and what these need, on CLASSPATH.

import com.google.protobuf.Duration;
import com.google.protobuf.Message;
import com.google.protobuf.Struct;
import com.google.protobuf.util.JsonFormat;
import io.grpc.ChannelCredentials;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.util.EnumSet;
import java.util.Iterator;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.function.Function;
import jobsvc.v1.JobOuterClass.Job;
import jobsvc.v1.JobOuterClass.JobEvent;
import jobsvc.v1.JobOuterClass.JobState;
import jobsvc.v1.JobServiceGrpc;
import jobsvc.v1.JobServiceGrpc.JobServiceBlockingStub;
import jobsvc.v1.JobServiceOuterClass.GetResultRequest;
import jobsvc.v1.JobServiceOuterClass.GetResultResponse;
import jobsvc.v1.JobServiceOuterClass.SubmitJobRequest;
import jobsvc.v1.JobServiceOuterClass.WatchJobRequest;
import jobsvc.v1.JobServiceOuterClass.WatchJobResponse;

public final class Main {
  private static final int HEARTBEAT_SECONDS =
      Integer.parseInt(setting("HEARTBEAT_SECONDS", "15"));

  // The server went away, sent us away for reading too slowly, stopped, or did not answer in time;
  // or we gave a silent stream up, which is CANCELLED too.
  private static final EnumSet<Status.Code> TRANSIENT =
      EnumSet.of(
          Status.Code.UNAVAILABLE,
          Status.Code.ABORTED,
          Status.Code.CANCELLED,
          Status.Code.DEADLINE_EXCEEDED);

  private final ManagedChannel channel;
  private final JobServiceBlockingStub jobs;
  private final ScheduledExecutorService timer =
      Executors.newSingleThreadScheduledExecutor(
          task -> {
            Thread thread = new Thread(task, "silence");
            thread.setDaemon(true);
            return thread;
          });

  private Main() throws Exception {
    String ca = setting("JOBSVC_TLS_CA", ""); // a PEM file; turns TLS on
    ChannelCredentials credentials =
        ca.isEmpty()
            ? InsecureChannelCredentials.create()
            : TlsChannelCredentials.newBuilder().trustManager(new File(ca)).build();
    channel =
        Grpc.newChannelBuilder(setting("JOBSVC_ADDRESS", "127.0.0.1:50051"), credentials).build();
    Metadata metadata = new Metadata();
    String token = setting("JOBSVC_TOKEN", "");
    if (!token.isEmpty()) {
      Metadata.Key<String> key =
          Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
      metadata.put(key, "Bearer " + token);
    }
    jobs =
        JobServiceGrpc.newBlockingStub(channel)
            .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
  }

  private static String setting(String name, String otherwise) {
    String value = System.getenv(name);
    return value == null ? otherwise : value;
  }

  /** Waits for a random time up to a bound that doubles from 0.2 s to 10 s. */
  private final class Backoff {
    private long bound = 200;

    void reset() {
      bound = 200;
    }

    void wait(StatusRuntimeException error, String then) throws InterruptedException {
      if (!TRANSIENT.contains(error.getStatus().getCode())) {
        throw error;
      }
      System.err.println(error.getMessage() + "; " + then);
      Thread.sleep(ThreadLocalRandom.current().nextLong(bound));
      bound = Math.min(2 * bound, 10_000);
      channel.resetConnectBackoff(); // its own would grow to two minutes
    }
  }

  /** Calls until there is an answer. SubmitJob too: its key makes that safe. */
  private <T> T insist(Function<JobServiceBlockingStub, T> call) throws InterruptedException {
    Backoff backoff = new Backoff();
    while (true) {
      try {
        return call.apply(jobs.withDeadlineAfter(10, TimeUnit.SECONDS));
      } catch (StatusRuntimeException error) {
        backoff.wait(error, "trying again");
      }
    }
  }

  /** Hands over every event once and in order, until the job has ended. */
  private void watch(String jobId, Consumer<JobEvent> seen) throws Exception {
    WatchJobRequest.Builder request =
        WatchJobRequest.newBuilder()
            .setJobId(jobId)
            .setHeartbeatInterval(Duration.newBuilder().setSeconds(HEARTBEAT_SECONDS));
    Backoff backoff = new Backoff();
    while (true) {
      try (Context.CancellableContext context = Context.current().withCancellation()) {
        ScheduledFuture<?> silence = giveUpLater(context);
        Iterator<WatchJobResponse> messages = context.call(() -> jobs.watchJob(request.build()));
        while (messages.hasNext()) {
          silence.cancel(false);
          silence = giveUpLater(context);
          WatchJobResponse message = messages.next();
          if (message.hasEvent()) {
            request.setAfterSequence(message.getEvent().getSequence());
            backoff.reset();
            seen.accept(message.getEvent());
          }
        }
        return;
      } catch (StatusRuntimeException error) {
        backoff.wait(error, "resuming after " + request.getAfterSequence());
      }
    }
  }

  private ScheduledFuture<?> giveUpLater(Context.CancellableContext context) {
    return timer.schedule(
        () -> context.cancel(null), 3 * HEARTBEAT_SECONDS, TimeUnit.SECONDS);
  }

  private int run(String jobType, String payload, String key) throws Exception {
    Struct.Builder input = Struct.newBuilder();
    JsonFormat.parser().merge(payload, input);
    SubmitJobRequest submit =
        SubmitJobRequest.newBuilder()
            .setJobType(jobType)
            .setPayload(input)
            // Says what the job is for, so that whoever asks again gets the same job.
            .setIdempotencyKey(key)
            .build();
    Job job = insist(stub -> stub.submitJob(submit)).getJob();
    System.out.println("job " + job.getJobId());
    watch(
        job.getJobId(),
        event ->
            System.out.println(
                event.getSequence()
                    + " "
                    + event.getType().name().replace("JOB_EVENT_TYPE_", "")
                    + " "
                    + event.getState().name().replace("JOB_STATE_", "")));
    GetResultRequest asked = GetResultRequest.newBuilder().setJobId(job.getJobId()).build();
    GetResultResponse answer = insist(stub -> stub.getResult(asked));
    Message outcome =
        answer.hasResult()
            ? answer.getResult()
            : answer.hasError() ? answer.getError() : answer.getResultBlob();
    String json = JsonFormat.printer().omittingInsignificantWhitespace().print(outcome);
    System.out.println(answer.getOutcomeCase().name().toLowerCase() + " " + json);
    return answer.getState() == JobState.JOB_STATE_SUCCEEDED ? 0 : 1;
  }

  public static void main(String[] arguments) throws Exception {
    if (arguments.length != 3) {
      System.err.println("usage: Main JOB_TYPE PAYLOAD KEY");
      System.exit(2);
    }
    int code = 1;
    Main main = new Main();
    try {
      code = main.run(arguments[0], arguments[1], arguments[2]);
    } catch (StatusRuntimeException error) {
      System.err.println(error.getMessage());
    } finally {
      main.channel.shutdownNow();
    }
    System.exit(code);
  }
}
